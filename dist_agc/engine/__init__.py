"""From parameters to scaled gradients: plan, measure, complete, judge, scale."""
