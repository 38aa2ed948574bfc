import pytest

from thanos_deploy.pattern import parse
from thanos_deploy.report import Speedup, verdict

FASTER = {
    "prefill": Speedup(1.01, 0.98, 1.04, 20),
    "decode": Speedup(0.99, 0.95, 1.02, 20),
}
PERPLEXITY = {"dense": 10.0, "pruned": 20.0}


@pytest.mark.parametrize(
    ("pattern", "holds", "said", "unsaid"),
    [
        ("2:4", True, "compute capability 8.0", "does not hold"),
        ("2:4", False, "does not hold in every row", "compute capability"),
        ("4:8", True, "No sparse tensor core takes 4:8", "compute capability"),
        ("unstructured:0.5", True, "No sparse tensor core takes unstructured:0.5", "2:4 brings"),
        ("structured:0.3", True, "the matrices keep their shapes", "tensor core"),
    ],
)
def test_the_verdict_promises_sparse_tensor_cores_only_where_they_apply(
    pattern: str, holds: bool, said: str, unsaid: str
) -> None:
    text = " ".join(verdict(parse(pattern), FASTER, PERPLEXITY, holds=holds))
    assert said in text
    assert unsaid not in text
    assert (f"{pattern} brings no speed on a CPU" in text) == (pattern != "structured:0.3")
    assert "1.01x (0.98x to 1.04x in 20 rounds)" in text
    assert "from 10.00 to 20.00" in text
