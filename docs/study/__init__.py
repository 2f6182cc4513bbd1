"""The study: does AGC keep what it promises, at a scale that one machine can try? `python docs/study --help`.

The page is docs/study.md; results.jsonl and the plots beside this file are what it shows.
"""
