"""What findings are called where people read them, the worst first."""

TITLES = {
    "invalid_row": "Rows that a job would refuse",
    "wrong_roles": "Roles out of order",
    "empty_output": "Empty answers",
    "truncated_output": "Answers that break off",
    "too_long": "Rows that are too long",
    "answer_cut": "Answers that the token limit cuts",
    "untrained": "Rows with no trained token",
    "pii": "Personal data and secrets",
    "test_leak": "Rows that are also in the other file",
    "repeated_elsewhere": "Rows that are also in another file of the project",
    "benchmark_overlap": "Rows of the general benchmark",
    "exact_duplicate": "Exact duplicates",
    "contradiction": "Similar questions with different labels",
    "mislabelled": "Labels that are likely wrong",
    "implausible_output": "Answers that the base finds implausible",
    "near_duplicate": "Near-duplicates",
    "inconsistent_output": "Answers in a different format",
    "refusal": "Answers that refuse",
    "answer_is_prompt": "Answers that repeat the question",
    "dominant_answer": "One answer for many rows",
    "low_diversity": "Many rows that ask nearly the same",
    "other_script": "Rows in a different script",
    "other_language": "Rows in a different language",
    "label_imbalance": "Uneven labels",
}
"""By kind."""
