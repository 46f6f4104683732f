"""What the layers of all families share on packed rows: projections, low-rank updates, attention,
readout pruning. blocks.py has the families.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from .attention import attend
from .last_layer import attend_one
from .low_rank import Among, LowRank, Part, adapt
from .ops import FromPrompts, backward_of, branches, linear
from .plan import Plan


class Block:
    """A layer on packed rows.

    Attributes:
        heads, kv_heads: of queries; of keys and values.
        scale: of the scores.
        causal: whether rows see only those before them.
        rotary: (cos, sin), [N, d] each, or None.
        bias: added to scores by the places of query and key in their text, [H, S, S], or None.
        linear: whether `project` is, so that its gradient is the same for all rows.
        names: role of a linear layer in the block -> its name in the Hugging Face layer.
        parts_of: role -> its low-rank updates, one for each adapter of the batch that has one.
    """

    heads: int
    kv_heads: int
    scale: float
    causal = True
    linear = False
    rotary: tuple[Tensor, Tensor] | None = None
    bias: Tensor | None = None
    names: ClassVar[dict[str, str]]
    parts_of: dict[str, list[Part]] = {}  # noqa: RUF012 (none; `update` gives a block its own)

    # -- low-rank updates ----------------------------------------------------------------------

    def update(self, updates: dict[str, LowRank], among: Among | None = None) -> None:
        """Takes updates, by the name of the linear layer in the Hugging Face layer; for some of
        the batch's texts, or all.
        """
        roles = {name: role for role, name in self.names.items()}
        self.parts_of = dict(self.parts_of)
        for name, update in updates.items():
            self.parts_of.setdefault(roles[name], []).append(Part(update, among=among))

    def updated(self, *roles: str) -> bool:
        """Whether one of these has an update."""
        return any(role in self.parts_of for role in roles)

    def adapt(self, x: Tensor, *outs: Tensor, roles: tuple[str, ...]) -> tuple[Tensor, ...]:
        """What frozen products made of rows x, with the updates of these roles."""
        if not self.parts_of:
            return outs
        return tuple(adapt(x, list(outs), [self.parts_of.get(role, []) for role in roles]))

    def product(self, role: str, x: Tensor) -> Tensor:
        """What one linear layer makes of rows x [n, D]."""
        return self.adapt(x, linear(getattr(self, role), x), roles=(role,))[0]

    def products(self, x: Tensor, *roles: str, keep: bool = False) -> tuple[Tensor, ...]:
        """What several make; with `keep`, x itself first, as of `branches`."""
        made = branches(x, *(getattr(self, role) for role in roles), keep=keep)
        kept, made = (made[:1], made[1:]) if keep else ((), made)
        return *kept, *self.adapt(kept[0] if keep else x, *made, roles=roles)

    # -- projections ---------------------------------------------------------------------------

    queries = ("query", "key", "value")

    def normed(self, x: Tensor) -> Tensor:
        """What the projections are made of, [n, D]."""
        return x

    def project_linear(self, x: Tensor, rows: Tensor | None = None) -> tuple[Tensor, ...]:
        """The frozen products of normed rows: [n, H d], [n, Hk d], [n, Hk d]."""
        return branches(x, *(getattr(self, role) for role in self.queries))

    def linear_backward(self, x: Tensor | None, rows: Tensor, grads: list[Tensor]) -> Tensor:
        """Gradient of `project_linear`, [n, D]."""
        return backward_of(self.project_linear, x, grads)

    def turned(self, q: Tensor, k: Tensor, v: Tensor, rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of those products: norms of heads, rotary positions."""
        return q, k, v

    def project(self, x: Tensor, rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of rows x [n, D]: [n, H d], [n, Hk d], [n, Hk d]."""
        x = self.normed(x)
        made = self.adapt(x, *self.project_linear(x), roles=self.queries)
        return self.turned(*made, rotary)

    def project_backward(self, x: Tensor | None, rows: Tensor, grads: list[Tensor]) -> Tensor:
        """Gradient of `project` for a few rows, [n, D].

        Args:
            x: [n, D], what these rows held; None where `linear`.
            rows: int64 [n], which.
            grads: of q, k and v there.
        """
        return backward_of(lambda x: self.project_rows(x, rows), x, grads)

    def project_rows(self, x: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """`project` of the rows `rows`, int64 [n]; None: of all."""
        return self.project(x, self._rotary(rows))

    def _rotary(self, rows: Tensor | None):
        if rows is None or self.rotary is None:
            return self.rotary
        return tuple(t[rows] for t in self.rotary)

    def project_all(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x for what comes after attention, and `project` of all its rows."""
        return x, *self.project(x, self.rotary)

    def project_first(self, x: Tensor, plan: Plan, held: list[Tensor] | None):
        """`project_all` where only the prompt rows of x have a gradient. What is held are the
        frozen products where an update changes them, else what `project` gives.
        """
        if not self.updated(*self.queries):
            functions = (self.project_rows, self.project_backward)
            return FromPrompts.apply(x, *functions, plan, held, not self.linear)
        # Updates learn from every row, so they stand behind what stops at the prompts.
        x, rows = self._normed_first(x, plan)
        functions = (self.project_linear, self.linear_backward)
        rows, *made = FromPrompts.apply(rows, *functions, plan, held, not self.linear)
        x = rows if x is None else x
        return x, *self.turned(*self.adapt(rows, *made, roles=self.queries), self.rotary)

    def _normed_first(self, x: Tensor, plan: Plan) -> tuple[Tensor | None, Tensor]:
        """x and its normed rows, with gradients at prompt rows; None: they are one tensor."""
        if self.linear:
            return None, x

        def backward(x, rows, grads):
            return backward_of(lambda x: (self.normed(x),), x, grads)

        return FromPrompts.apply(x, lambda x, rows: (self.normed(x),), backward, plan)

    # -- the layer -----------------------------------------------------------------------------

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The layer's output rows from its input rows and what attention gave, [n, D]."""
        raise NotImplementedError

    def read(
        self, x: Tensor, rows: Tensor, place: Tensor | None, plan: Plan, first: bool
    ) -> tuple[Tensor, Tensor]:
        """The rows `rows` [B] alone, one of each text: [B, D], and what attention gives them,
        [B, H d].
        """
        raise NotImplementedError

    def read_plainly(
        self, x: Tensor, rows: Tensor, place: Tensor | None, plan: Plan
    ) -> tuple[Tensor, Tensor]:
        """`read` by the keys and values of all rows."""
        q, k, v = self.project(x, self.rotary)
        attended = attend_one(
            q.index_select(0, rows),
            k,
            v,
            plan,
            heads=self.heads,
            kv_heads=self.kv_heads,
            scale=self.scale,
            causal=self.causal,
            place=place,
            bias=self.bias,
        )
        return x.index_select(0, rows), attended

    def run(self, x: Tensor, plan: Plan, first: bool, held: list[Tensor] | None) -> Tensor:
        """The whole layer, [N, D] -> [N, D].

        Args:
            first: only the prompt rows of x have a gradient.
            held: in the first layer, what is known of the text rows (`project_first`).
        """
        x, q, k, v = self.project_first(x, plan, held) if first else self.project_all(x)
        attended = attend(
            q,
            k,
            v,
            plan,
            heads=self.heads,
            kv_heads=self.kv_heads,
            scale=self.scale,
            causal=self.causal,
            prompt_only=first and not self.updated(*self.queries),
            bias=self.bias,
        )
        return self.finish(x, attended)

    def run_last(self, x: Tensor, plan: Plan, place: Tensor | None, first: bool) -> Tensor:
        """The layer's output at one token of each text, [N, D] -> [B, D]: queries, output and
        feed-forward for that row alone (DESIGN section 4, readout pruning).
        """
        rows = plan.readout_rows(place)
        if any(part.drops for role in self.queries for part in self.parts_of.get(role, ())):
            # (Rows that are dropped differently for each update have no common form.)
            return self.finish(*self.read_plainly(x, rows, place, plan))
        return self.finish(*self.read(x, rows, place, plan, first))
