"""A model as this rank sees it: names, unit rules, blocks and cuts. Integers only; nothing here communicates."""
