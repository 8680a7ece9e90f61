import pytest

from motkit.verify import last_boxed, last_number, verify_exact


@pytest.mark.parametrize(
    ("response", "answer", "correct"),
    [
        (r"The answer is \boxed{42}.", "42", True),
        (r"\boxed{41}, no: \boxed{42}", "42", True),
        (r"\boxed{42}, no: \boxed{41}", "42", False),
        (r"\boxed{42} and an unbalanced \boxed{41", "42", True),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", True),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}", True),
        (r"\boxed{}", "0", False),
        (r"\boxed{1,000}", "1000", True),
        (r"\boxed{1000.0}", "1,000", True),
        (r"\boxed{0.5}", ".5", True),
        (r"\boxed{-3}", "3", False),
        (r"\boxed{$7$}", "7", True),
        (r"\boxed{x}", "X", False),
        ("first 3 apples, then 4: 12.", "12", True),
        ("12 apples, 3 left", "12", False),
        ("20-7", "7", True),
        ("it is -7", "-7", True),
        ("no number at all", "1", False),
        ("", "1", False),
        (r"\boxed{1e3}", "1000", True),
    ],
)
def test_exact(response, answer, correct):
    assert verify_exact(response, answer).correct is correct


def test_nested_braces_stay_whole():
    assert last_boxed(r"a \boxed{\frac{a}{b_{1}}} b") == r"\frac{a}{b_{1}}"
    assert last_boxed("nothing") is None


def test_numbers_are_taken_as_written():
    assert last_number("from 1,234.50 to 3.") == "3"
    assert last_number("1,234.50") == "1,234.50"
    assert last_number("version e5") == "5"


def test_hostile_text_costs_linear_time():
    assert verify_exact(r"\boxed{" * 2000 + "1" * 100_000, "1").correct is False
