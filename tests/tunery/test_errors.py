"""Error messages, raised in this process or passed on from another one."""

from tunery.failures import DoesNotFit, InvalidNExamples, JobFailure


def test_a_docstring_is_the_message() -> None:
    error = InvalidNExamples(param="training_file", role="Training", n=3, least=10)
    assert error.message == "Training file has 3 example(s), but must have at least 10 examples"
    assert (error.param, error.fields) == ("training_file", {"role": "Training", "n": 3, "least": 10})


def test_a_reported_failure_has_its_class_and_its_own_words() -> None:
    error = JobFailure.quoted("does_not_fit", "The GPU is full: {'rows': 1}", "technique")
    assert type(error) is DoesNotFit
    assert (error.message, error.param, error.code) == ("The GPU is full: {'rows': 1}", "technique", "does_not_fit")


def test_a_reported_failure_of_an_unknown_code_is_a_failure_all_the_same() -> None:
    error = JobFailure.quoted("invented", "Something else", None)
    assert type(error) is JobFailure
    assert error.message == "Something else"
