"""Calls of every CPU kernel in one image, and the judgement of their results."""

from __future__ import annotations

import torch
from attention_calls import assert_attention_calls, attention_calls
from attention_cases import attention_case
from block_sums_calls import assert_block_sums, block_sums_calls
from frozen_layer_calls import gated_silu_calls, rms_norm_calls
from kernel_calls import (
    CHUNK,
    accumulate_calls,
    accumulate_case,
    assert_accumulated,
    assert_softmax_block,
    logprob_calls,
    softmax_calls,
)
from kernel_drivers import CallImage, CallResults
from logprob_cases import DTYPES, assert_right, make_case, shaped_rows, special_rows
from unit_product_calls import unit_product_calls, unit_product_case


class EveryOp:
    """One image for all: the program that runs it is slow to start. Odd sizes, strides and alignments, and nothing at all."""

    def __init__(self, guard: int = 64) -> None:
        self.image = CallImage(guard)
        self._logprobs = []
        self._softmax = []
        for dtype in DTYPES:
            cases = (
                make_case(4, 1100, dtype, padding=2),
                make_case(5, 2011, dtype, padding=1, entropy=True),
                make_case(2, 1, dtype, entropy=True),
                make_case(0, 7, dtype, entropy=True),
                make_case(40, 4099, dtype),
                special_rows(1500, dtype),
                shaped_rows(77, dtype),
            )
            for index, case in enumerate(cases):
                self._logprobs.append(logprob_calls(case, self.image, in_place=index == 1, misaligned=index == 0))
            for softcap in (0.0, 30.0):
                self._softmax += [
                    softmax_calls(dtype, softcap, self.image),
                    softmax_calls(dtype, softcap, self.image, width=64, entropy=False),
                    softmax_calls(dtype, softcap, self.image, width=3, weights=False, entropy=False),
                    softmax_calls(dtype, softcap, self.image, rows=0),
                ]
        self._block_sums = [
            block_sums_calls(dtype, self.image, width=width, entropy=entropy, with_products=with_products)
            for dtype in DTYPES
            for width in (1, 35, 64)
            for entropy in (False, True)
            for with_products in (False, True)
        ]
        self._unit_products = [
            unit_product_calls(unit_product_case(lengths, columns, dtype, **options), self.image)
            for dtype in DTYPES
            for lengths, columns, options in (
                ([70, 0, 3], (5, 300), {}),
                ([9, 20, 1], (40, 33), {"turned": True, "inner": 2, "order": [1, 0, 1]}),
                ([130], (16, 64), {"labels": 1}),
                ([], (1, 1), {}),
            )
        ]
        self._frozen_layers = [
            calls(dtype, rows, width, self.image)
            for dtype in DTYPES
            for calls in (rms_norm_calls, gated_silu_calls)
            for rows, width in ((3, 37), (2, 64), (1, 1), (0, 5))
        ]
        shapes = [(9, (40, 0, 3)), (2, ()), (0, (5,)), (130, (17, 1))]
        forms = [
            {"heads": 4, "key_heads": 2, "size": 16, "window": None, "layout": "heads first"},
            {"heads": 3, "key_heads": 3, "size": 21, "window": 7, "layout": "tokens first", "columns": 3},
            {"heads": 3, "key_heads": 1, "size": 33, "window": 100, "layout": "apart", "columns": 1, "sinks": True},
        ]
        self._attention = [
            attention_calls(attention_case(shapes, dtype, **form), self.image)
            for dtype in (torch.float32, torch.float64, torch.bfloat16)
            for form in forms
        ]
        self._attention.append(attention_calls(attention_case([]), self.image))
        self._sums = []
        for sizes in ((0, 1, 7, CHUNK + 1), ()):
            for update in (True, False):
                case = accumulate_case(sizes, update=update)
                self._sums.append(accumulate_calls(case, self.image, misaligned=update))

    def assert_right(self, results: CallResults) -> None:
        for calls in self._logprobs:
            assert_right(calls.outcome(results), calls.case)
        for softmax in self._softmax:
            assert_softmax_block(softmax, results)
        for block_sums in self._block_sums:
            assert_block_sums(block_sums, results)
        for unit_products in self._unit_products:
            unit_products.assert_right(results)
        for frozen in self._frozen_layers:
            frozen.assert_right(results)
        for attention in self._attention:
            assert_attention_calls(attention, results)
        for sums in self._sums:
            assert_accumulated(*sums.outcome(results), sums.case)
