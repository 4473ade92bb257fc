"""What every layer needs to know of one step: lengths, positions and which positions to keep."""

from __future__ import annotations

import numpy as np

from ortlm.graph.builder import Builder, Shape, Value
from ortlm.graph.norm import FlatSelection, Selection
from ortlm.spec import QueryScale, Rope

_PATH = "/model/step"
# New tokens of a row from which an integer matmul is faster than one with packed weights.
MANY = 16


class Step:
    """Values derived once from ``attention_mask`` int64 [B, T], whose ones are each row's tokens so far.

    ``last_key`` int32 [B]: index of each row's last token. ``total`` int32 []: T. ``query_lengths`` int32
    [B]: how many of the S new positions of a row are real (rows are padded on the right), or None where
    the target's attention does not take it. ``axes`` int64 [3, B, S] are the three positions of every new token,
    where rotations go by them.
    """

    def __init__(
        self,
        g: Builder,
        ids: Value,
        mask: Value,
        positions: Value | None,
        *,
        all_logits: bool,
        mutual: bool = False,
        axes: Value | None = None,
    ) -> None:
        self._g, self._given, self._mask = g, positions, mask
        self._axes = axes
        self._all_logits = all_logits
        self._made: dict[str, Value] = {}
        self._turned: dict[str, tuple[Value, tuple[Value, Value]]] = {}
        # All in int64, which devices without it leave to the CPU: in int32 they take single steps of it to
        # themselves, and every one is a copy there and back.
        self._lengths = g.op(
            "ReduceSum", mask, g.integers(1), shape=("batch_size",), dtype="int64", name=_PATH, keepdims=0
        )
        last = g.op("Sub", self._lengths, g.integer(1), shape=("batch_size",), dtype="int64", name=_PATH)
        self.last_key = g.cast(last, "int32", ("batch_size",), f"{_PATH}/last_key")
        total = g.op("Shape", mask, shape=(1,), dtype="int64", name=_PATH, start=1, end=2)
        self._total = g.op("Squeeze", total, shape=(), dtype="int64", name=_PATH)
        self.total = g.cast(self._total, "int32", (), f"{_PATH}/total")
        sequence = g.op("Shape", ids, shape=(1,), dtype="int64", name=f"{_PATH}/sequence", start=1, end=2)
        self._sequence = g.op("Squeeze", sequence, shape=(), dtype="int64", name=f"{_PATH}/sequence")
        # A row has at most S new tokens, and at most as many as it has tokens: that is exact for a first
        # prompt, one token at a time, and a single row. Only an appended ragged batch has to say more.
        width = self._next_to_lengths(self._sequence, f"{_PATH}/new")
        self._new = g.op(
            "Min", self._lengths, width, shape=("batch_size",), dtype="int64", name=f"{_PATH}/new"
        )
        self.query_lengths: Value | None = None
        self._given_lengths: Value | None = None
        self.optional: dict[str, str] = {}
        if g.target.query_lengths:
            given = g.optional_input("query_lengths", np.array([-1], np.int32), ("query_rows",))
            self.optional["query_lengths"] = "query_lengths"
            given = g.cast(given, "int64", ("query_rows",), f"{_PATH}/new")
            self._given_lengths = given
            absent = g.op(
                "Less", given, g.integer(0), shape=("query_rows",), dtype="bool", name=f"{_PATH}/new"
            )
            self._new = g.op(
                "Where", absent, self._new, given, shape=("batch_size",), dtype="int64", name=f"{_PATH}/new"
            )
            self.query_lengths = g.cast(self._new, "int32", ("batch_size",), f"{_PATH}/query_lengths")
        # Columns of padding before the new tokens of each row, int64 [B, 1]; None where there is none on the left.
        self._shift: Value | None = None
        if g.target.left_padding:
            self._shift = self._leading_zeros(mask, self._total)
        self._images: Value | None = None
        if mutual:
            nothing = np.zeros((1, 1), np.int64)
            self._images = g.optional_input("picture_numbers", nothing, ("picture_rows", "picture_columns"))
            self.optional["picture_numbers"] = "picture_numbers"

    def _next_to_lengths(self, number: Value, path: str) -> Value:
        """Return an int64 ``number`` that comes from a shape for use together with what comes from the mask.

        Shapes are in main memory and the mask is on the device, so that both in one operator make a copy, and runs
        with copies cannot be captured. Range takes numbers from main memory and writes on the device.
        """
        g = self._g
        if not g.target.captured:
            return number
        end = g.op("Add", number, g.integer(1), shape=(), dtype="int64", name=path)
        return g.op("Range", number, end, g.integer(1), shape=(1,), dtype="int64", name=path)

    def _leading_zeros(self, mask: Value, total: Value) -> Value:
        """Return how many of the new columns of ``mask`` come before a row's first token, int64 [B, 1].

        It is 0 for rows that are padded on the right, or have no new token.
        """
        g, path = self._g, f"{_PATH}/padding"
        start = g.op("Sub", total, self._sequence, shape=(), dtype="int64", name=path)
        start = g.op("Unsqueeze", start, g.integers(0), shape=(1,), dtype="int64", name=path)
        end = g.op("Unsqueeze", total, g.integers(0), shape=(1,), dtype="int64", name=path)
        lead = ("batch_size", "sequence_length")
        new = g.op("Slice", mask, start, end, g.integers(1), shape=lead, dtype="int64", name=path)
        # ArgMax gives the first of the largest.
        return g.op("ArgMax", new, shape=("batch_size", 1), dtype="int64", name=path, axis=1, keepdims=1)

    def compact(self, ids: Value) -> Value:
        """Return token ``ids`` int64 [B, S] with each row's padding after its tokens, as attention wants it.

        The cache then holds no padding: a row's length alone says what is in it, whatever the mask looks like.
        """
        if self._shift is None:
            return ids
        g, path = self._g, f"{_PATH}/padding"
        lead = ("batch_size", "sequence_length")
        steps = g.op(
            "Range", g.integer(0), self._sequence, g.integer(1),
            shape=("sequence_length",), dtype="int64", name=path,
        )  # fmt: skip
        at = g.op("Add", steps, self._shift, shape=lead, dtype="int64", name=path)
        at = g.op("Mod", at, self._sequence, shape=lead, dtype="int64", name=path)
        return g.op("GatherElements", ids, at, shape=lead, dtype="int64", name=path, axis=1)

    def many(self) -> Value:
        """Return whether there are so many new tokens in a row that integer matmuls are faster, bool []."""
        return self._g.op(
            "Greater",
            self._sequence,
            self._g.integer(MANY - 1),
            shape=(),
            dtype="bool",
            name=f"{_PATH}/many",
        )

    def ragged(self) -> Value | None:
        """Return whether lengths of the rows are given, bool []; None where they never are."""
        if self._given_lengths is None:
            return None
        if "ragged" not in self._made:
            g, path = self._g, f"{_PATH}/ragged"
            most = g.op("ReduceMax", self._given_lengths, shape=(), dtype="int64", name=path, keepdims=0)
            self._made["ragged"] = g.op(
                "GreaterOrEqual", most, g.integer(0), shape=(), dtype="bool", name=path
            )
        return self._made["ragged"]

    def same_image(self) -> Value | None:
        """Return whether new tokens are images' that attend to each other both ways, bool []; None if none do.

        The optional input ``picture_numbers`` int64 [B, S] says which: the same number above 0 for the tokens
        of one image, 0 for words.
        """
        if self._images is None:
            return None
        if "shows" not in self._made:
            self.positions()  # what is emitted within a branch cannot be seen outside, so it comes first
            g, path = self._g, f"{_PATH}/images"
            most = g.op("ReduceMax", self._images, shape=(), dtype="int64", name=path, keepdims=0)
            self._made["shows"] = g.op("Greater", most, g.integer(0), shape=(), dtype="bool", name=path)
        return self._made["shows"]

    def mutual_mask(self, window: int | None) -> Value:
        """Return what each new token sees, bool [B, 1, S, T]: what comes before it, and its whole image.

        It is emitted where it is asked for.
        """
        g, path = self._g, f"{_PATH}/mutual"
        assert self._images is not None
        pair: Shape = ("batch_size", "sequence_length", "sequence_length")
        column: Shape = ("batch_size", "sequence_length", 1)
        row: Shape = ("batch_size", 1, "sequence_length")
        wide: Shape = ("batch_size", "sequence_length", "total_sequence_length")

        def op(kind: str, *inputs: Value, of: str = "bool", shape: Shape = wide, **attributes: int) -> Value:
            return g.ops(kind, inputs, outputs=[(of, shape)], name=path, attributes=attributes)[0]

        own = op("Unsqueeze", self._images, g.integers(2), of="int64", shape=column)
        others = op("Unsqueeze", self._images, g.integers(1), of="int64", shape=row)
        same = op(
            "And",
            op("Equal", own, others, shape=pair),
            op("Greater", own, g.integer(0), shape=column),
            shape=pair,
        )
        at = op("Unsqueeze", self.positions(), g.integers(2), of="int64", shape=column)
        places = op("Unsqueeze", self.positions(), g.integers(1), of="int64", shape=row)
        # The first and the last place of each token's image; of a word, places that no key has.
        last = op("Where", same, places, g.integer(-1), of="int64", shape=pair)
        last = op("ReduceMax", last, g.integers(2), of="int64", shape=column, keepdims=1)
        far = self._total
        first = op("Where", same, places, far, of="int64", shape=pair)
        first = op("ReduceMin", first, g.integers(2), of="int64", shape=column, keepdims=1)
        keys = op("Range", g.integer(0), far, g.integer(1), of="int64", shape=("total_sequence_length",))
        inside = op("And", op("GreaterOrEqual", keys, first), op("LessOrEqual", keys, last))
        seen = op("Or", op("LessOrEqual", keys, at), inside)
        if window is not None:
            # An image that is longer than the window is no exception to it.
            least = op("Sub", at, g.integer(window), of="int64", shape=column)
            seen = op("And", seen, op("Greater", keys, least))
        return op(
            "Unsqueeze",
            seen,
            g.integers(1),
            shape=("batch_size", 1, "sequence_length", "total_sequence_length"),
        )

    def positions(self) -> Value:
        """Return the position int64 [B, S] of every new token."""
        if self._given is not None:
            return self._given
        if "positions" not in self._made:
            g, path = self._g, f"{_PATH}/positions"
            start = g.op("Sub", self._lengths, self._new, shape=("batch_size",), dtype="int64", name=path)
            start = g.op("Unsqueeze", start, g.integers(1), shape=("batch_size", 1), dtype="int64", name=path)
            steps = g.op(
                "Range", g.integer(0), self._sequence, g.integer(1),
                shape=("sequence_length",), dtype="int64", name=path,
            )  # fmt: skip
            at = g.op("Add", start, steps, shape=("batch_size", "sequence_length"), dtype="int64", name=path)
            # Padding of a long row could point past the table.
            last = g.op("Sub", self._total, g.integer(1), shape=(), dtype="int64", name=path)
            last = self._next_to_lengths(last, path)
            self._made["positions"] = g.op(
                "Min", at, last, shape=("batch_size", "sequence_length"), dtype="int64", name=path
            )
        return self._made["positions"]

    def turned(self, rope: Rope) -> tuple[Value, tuple[Value, Value]] | None:
        """Return what rotates every new token by its three positions; None if ``rope`` goes by a single one.

        That is a number of each token, int64 [B, S], and rows with these numbers of cosines and sines,
        [B · S, dims / 2].
        """
        if self._axes is None or rope.axes is None:
            return None
        key = f"turned/{rope}"
        if key not in self._turned:
            g, path, half = self._g, f"{_PATH}/turned", len(rope.inv_freq)
            lead = ("batch_size", "sequence_length")
            at = g.op("Transpose", self._axes, shape=(*lead, 3), dtype="int64", name=path, perm=(1, 2, 0))
            at = g.op(
                "Gather", at, g.integers(*rope.axes), shape=(*lead, half), dtype="int64", name=path, axis=2
            )
            at = g.op("Reshape", at, g.integers(-1, half), shape=("tokens", half), dtype="int64", name=path)
            frequencies = g.constant(np.array([rope.inv_freq], np.float32), f"{path}.inv_freq")
            angles = g.op(
                "Mul", g.cast(at, "fp32", ("tokens", half), path), frequencies,
                shape=("tokens", half), dtype="fp32", name=path,
            )  # fmt: skip
            tables = []
            for function in ("Cos", "Sin"):
                x = g.op(function, angles, shape=("tokens", half), dtype="fp32", name=path)
                if rope.factor != 1.0:
                    factor = g.number(rope.factor, "fp32")
                    x = g.op("Mul", x, factor, shape=("tokens", half), dtype="fp32", name=path)
                tables.append(x if g.dtype == "fp32" else g.cast(x, g.dtype, ("tokens", half), path))
            sizes = g.op("Shape", self._axes, shape=(2,), dtype="int64", name=path, start=1, end=3)
            count = g.op("ReduceProd", sizes, shape=(), dtype="int64", name=path, keepdims=0)
            numbers = g.op(
                "Range", g.integer(0), count, g.integer(1), shape=("tokens",), dtype="int64", name=path
            )
            numbers = g.op("Reshape", numbers, sizes, shape=lead, dtype="int64", name=path)
            self._turned[key] = numbers, (tables[0], tables[1])
        return self._turned[key]

    def query_scale(self, scale: QueryScale) -> Value:
        """Return what the query of every new token is multiplied by, [B, S, 1]."""
        name = f"scale-{scale}"
        if name not in self._made:
            g, path = self._g, f"{_PATH}/query_scale"
            lead = ("batch_size", "sequence_length")
            times = g.op(
                "Div", self.positions(), g.integer(scale.length), shape=lead, dtype="int64", name=path
            )
            x = g.cast(times, "fp32", lead, path)
            x = g.op("Add", x, g.number(1.0, "fp32"), shape=lead, dtype="fp32", name=path)
            x = g.op("Log", x, shape=lead, dtype="fp32", name=path)
            x = g.op("Mul", x, g.number(scale.beta, "fp32"), shape=lead, dtype="fp32", name=path)
            x = g.op("Add", x, g.number(1.0, "fp32"), shape=lead, dtype="fp32", name=path)
            x = g.op("Unsqueeze", x, g.integers(2), shape=(*lead, 1), dtype="fp32", name=path)
            self._made[name] = x if g.dtype == "fp32" else g.cast(x, g.dtype, (*lead, 1), path)
        return self._made[name]

    def ends(self, count: int) -> Value:
        """Return where each row's last ``count`` tokens are, int64 [B, count, 1].

        That is in what has ``count`` earlier tokens before the S new ones, of which not all need be real.
        """
        key = f"ends/{count}"
        if key not in self._made:
            g, path = self._g, f"{_PATH}/ends"
            shape = ("batch_size", count)
            first = g.op(
                "Unsqueeze", self._new, g.integers(1), shape=("batch_size", 1), dtype="int64", name=path
            )
            at = g.op("Add", first, g.integers(*range(count)), shape=shape, dtype="int64", name=path)
            self._made[key] = g.op(
                "Unsqueeze", at, g.integers(2), shape=(*shape, 1), dtype="int64", name=path
            )
        return self._made[key]

    def real(self) -> Value:
        """Return 1 for each new token and 0 for padding after a row's tokens, [B, S, 1]."""
        if "real" not in self._made:
            g, path = self._g, f"{_PATH}/real"
            steps = g.op(
                "Range", g.integer(0), self._sequence, g.integer(1),
                shape=("sequence_length",), dtype="int64", name=path,
            )  # fmt: skip
            count = g.op(
                "Unsqueeze", self._new, g.integers(1), shape=("batch_size", 1), dtype="int64", name=path
            )
            lead = ("batch_size", "sequence_length")
            there = g.op("Less", steps, count, shape=lead, dtype="bool", name=path)
            there = g.op("Unsqueeze", there, g.integers(2), shape=(*lead, 1), dtype="bool", name=path)
            self._made["real"] = g.cast(there, g.dtype, (*lead, 1), path)
        return self._made["real"]

    def switched(self, rope: Rope) -> Value | None:
        """Return row numbers int64 [B, S] in a table that holds short and long rows, or None if it does not.

        All positions move to the long rows once the total length of the batch exceeds the switch.
        """
        if rope.switch_tokens is None or rope.long_inv_freq is None:
            return None
        key = f"switched/{rope.switch_tokens}"
        if key not in self._made:
            g, path = self._g, f"{_PATH}/switch"
            beyond = g.op(
                "Greater",
                self._total,
                g.integer(rope.switch_tokens),
                shape=(),
                dtype="bool",
                name=path,
            )
            offset = g.op(
                "Mul",
                g.cast(beyond, "int64", (), path),
                g.integer(rope.switch_tokens),
                shape=(),
                dtype="int64",
                name=path,
            )
            self._made[key] = g.op(
                "Add",
                self.positions(),
                self._next_to_lengths(offset, path),
                shape=("batch_size", "sequence_length"),
                dtype="int64",
                name=path,
            )
        return self._made[key]

    def selection(self) -> Selection | None:
        """Return what keeps the positions whose logits are wanted; None keeps all.

        The input ``num_logits_to_keep`` (int64, optional with the default 1 unless the target always gives it)
        counts them from each row's last real token backwards; 0 keeps every position, in the order of the ids.
        """
        if self._all_logits:
            return None
        g, path = self._g, f"{_PATH}/keep"
        name = "num_logits_to_keep"
        wanted = (
            g.input(name, "int64", ())
            if g.target.left_padding
            else g.optional_input(name, np.array(1, np.int64), ())
        )
        self.optional["logits_to_keep"] = name
        # A product with a shape's number stays with it in main memory, see ``_next_to_lengths``.
        scaled = g.op("Mul", wanted, self._sequence, shape=(), dtype="int64", name=path)
        everything = g.op("Less", scaled, g.integer(1), shape=(), dtype="bool", name=path)
        count = g.op("Min", wanted, self._sequence, shape=(), dtype="int64", name=path)
        count = g.op("Where", everything, self._sequence, count, shape=(), dtype="int64", name=path)
        start = g.op(
            "Sub",
            self._new,
            self._next_to_lengths(count, path),
            shape=("batch_size",),
            dtype="int64",
            name=path,
        )
        start = g.op("Max", start, g.integer(0), shape=("batch_size",), dtype="int64", name=path)
        if self._shift is not None:
            # Where the first of the ids went when padding on the left was moved after the tokens.
            first = g.op(
                "Squeeze", self._shift, g.integers(1), shape=("batch_size",), dtype="int64", name=path
            )
            first = g.op("Neg", first, shape=("batch_size",), dtype="int64", name=path)
            start = g.op("Where", everything, first, start, shape=("batch_size",), dtype="int64", name=path)
        start = g.op("Unsqueeze", start, g.integers(1), shape=("batch_size", 1), dtype="int64", name=path)
        steps = g.op("Range", g.integer(0), count, g.integer(1), shape=("kept",), dtype="int64", name=path)
        at = g.op("Add", start, steps, shape=("batch_size", "kept"), dtype="int64", name=path)
        if self._shift is not None:
            at = g.op("Mod", at, self._sequence, shape=("batch_size", "kept"), dtype="int64", name=path)
        if g.target.captured:
            at = g.op(
                "Add", at, self._first_columns(), shape=("batch_size", "kept"), dtype="int64", name=path
            )
            return FlatSelection(g, at)
        at = g.op("Unsqueeze", at, g.integers(2), shape=("batch_size", "kept", 1), dtype="int64", name=path)
        return Selection(g, at)

    def _first_columns(self) -> Value:
        """Return which position each row begins at if all rows are one after the other, int64 [B, 1]."""
        g, path = self._g, f"{_PATH}/keep"
        rows = g.op("Shape", self._mask, shape=(1,), dtype="int64", name=path, start=0, end=1)
        rows = g.op("Squeeze", rows, shape=(), dtype="int64", name=path)
        end = g.op("Mul", rows, self._sequence, shape=(), dtype="int64", name=path)
        at = g.op("Range", g.integer(0), end, self._sequence, shape=("batch_size",), dtype="int64", name=path)
        return g.op("Unsqueeze", at, g.integers(1), shape=("batch_size", 1), dtype="int64", name=path)
