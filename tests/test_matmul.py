"""Products of arrays go through one function, which keeps NumPy's false warnings to itself."""

import ast
from pathlib import Path

import numpy as np
import pytest

import moe_fast
from moe_fast.matmul import matmul

SOURCE = Path(moe_fast.__file__).parent
OF_TENSORS = "calibration/score.py"  # torch's products, which warn of nothing


def test_it_is_the_product_without_a_warning():
    large = np.full((2, 3), 1e30, np.float32)
    with np.errstate(all="raise"):
        with pytest.raises(FloatingPointError, match="encountered in matmul"):
            large @ large.T
        assert np.isinf(matmul(large, large.T)).all()
    left, right = np.arange(6.0).reshape(2, 3), np.arange(12.0).reshape(3, 4)
    np.testing.assert_array_equal(matmul(left, right), np.dot(left, right))


def test_no_array_is_multiplied_elsewhere():
    """On Apple silicon, NumPy warns of any product: users would see it in every command."""
    products = {
        file.relative_to(SOURCE).as_posix()
        for file in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult)
    }
    assert products == {"matmul.py", OF_TENSORS}
