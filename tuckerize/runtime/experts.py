"""The routed experts of one layer, computed from Tucker factors, whole or sharded.

For a token x and its expert e, with C_e = Σ_a U_E[e, a] core_a:

    gate, up:  U_H (C_e (U_Iᵀ x))        down:  U_I (C_eᵀ (U_Hᵀ h))

U_I of gate and up is applied once per token, that of down once per token after the sum over its
experts; only the cores are multiplied per expert. Letters at the end of tensor names: T tokens,
k experts per token, N rows (a token with one of its experts), others as in linalg.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from tuckerize.domain import GATE_UP, SHARED_U_I, Coupling, Mode, Projection
from tuckerize.errors import CheckpointError
from tuckerize.format.cores import parts_of_cores
from tuckerize.linalg.tucker import TuckerFactors
from tuckerize.names import TensorKind, TensorName, expert_rows, group_module
from tuckerize.runtime.activations import Activation
from tuckerize.runtime.exchange import Combine, Exchange, Tokens, dispatch_all
from tuckerize.runtime.grouped import (
    Assignments,
    assign,
    by_columns,
    gemm,
    mix_and_multiply,
    multiply,
    multiply_uneven,
)
from tuckerize.runtime.quantised import CoreOnDisk, QuantisedCore, QuantisedRows, multiply_quantised


def named_tensors(
    coupling: Coupling,
    projection: Projection,
    factors: TuckerFactors,
    widths: Sequence[int] | None = None,
) -> Iterator[tuple[TensorName, Tensor]]:
    """Stored tensors of one stack, by their names relative to the group.

    One core for all experts, or, where their widths differ, a matrix of core rows for each.

    Args:
        coupling: The projections that share one U_I with it.
        projection: Its projection.
        factors: Its Tucker tensor.
        widths: Neurons of every expert; rows of the core beyond them are zero. None if all.
    """
    if widths is None or len(set(widths)) == 1:
        yield TensorName.core(projection), factors.core
    else:
        for expert, width in enumerate(widths):
            yield TensorName.core(projection, expert), factors.core[expert, :width]
    for mode, factor in zip(Mode, factors.factors, strict=True):
        if factor is not None:
            yield TensorName.factor(mode, projection, coupling), factor


def named_biases(
    projection: Projection, bias: Tensor, widths: Sequence[int] | None = None
) -> dict[TensorName, Tensor]:
    """Stored biases of one projection, by their names relative to the group.

    Args:
        projection: The projection.
        bias: Its biases, shape (E, H), of down (E, I).
        widths: Neurons of every expert; None if all.
    """
    if projection == Projection.DOWN or widths is None or len(set(widths)) == 1:
        return {TensorName.bias(projection): bias}
    return {TensorName.bias(projection, e): bias[e, :width] for e, width in enumerate(widths)}


class TuckerStack(nn.Module):
    """Core and factors of one stack, whole or a process's slices; absent ones are None.

    The core is a list of the experts' matrices where their widths differ, and a module where it is
    quantised.

    Args:
        tensors: Tensors of one owner by their names, relative to the group.
    """

    core: Tensor | nn.ParameterList | QuantisedCore | QuantisedRows | None
    U_E: Tensor | None
    U_H: Tensor | None
    U_I: Tensor | None
    bias: Tensor | nn.ParameterList | None

    def __init__(self, tensors: Mapping[TensorName, Tensor]) -> None:
        super().__init__()
        plain = {name: tensor for name, tensor in tensors.items() if name.part is None}
        whole = {name.kind: tensor for name, tensor in plain.items() if name.expert is None}
        for kind in TensorKind:
            self.register_parameter(kind.value, _parameter(whole.get(kind)))
        quantised = {name: QuantisedCore(parts) for name, parts in parts_of_cores(tensors).items()}
        if quantised or expert_rows(plain):
            del self.core  # a name is that of a parameter or of a module
        if rows := expert_rows(plain):
            self.core = nn.ParameterList(_parameter(tensors[name]) for name in rows)
        elif rows := expert_rows(quantised):
            self.core = QuantisedRows(quantised[name] for name in rows)
        elif quantised:
            (self.core,) = quantised.values()
        if rows := expert_rows(plain, TensorKind.BIAS):
            del self.bias
            self.bias = nn.ParameterList(_parameter(tensors[name]) for name in rows)

    def read_core(self, core: CoreOnDisk) -> None:
        """Read matrices whenever they are used, in place of a core in memory."""
        del self.core  # a name is that of a parameter or of a module
        self.core = core

    def multiply(self, rows_NX: Tensor, assigned: Assignments, *, transposed: bool) -> Tensor:
        """Multiply every row by the C_e of its expert, or by C_eᵀ.

        Where experts differ in width, rows are zero-padded to the widest.
        """
        if self.core is None:
            raise CheckpointError("a stack has no core", hint="write the checkpoint again")
        if isinstance(self.core, QuantisedCore | QuantisedRows):
            U_E = None if self.U_E is None else _own(self.U_E).to(rows_NX.dtype)
            return multiply_quantised(rows_NX, self.core, assigned, U_E)

        def oriented(core: Tensor) -> Tensor:
            if not transposed:
                return _own(core).to(rows_NX.dtype).mT
            own = by_columns(core) if self.U_E is None else core
            return _own(own).to(rows_NX.dtype)

        if isinstance(self.core, nn.ParameterList):
            matrices = [oriented(matrix) for matrix in self.core]
            return multiply_uneven(rows_NX, matrices, assigned)
        if self.U_E is None:
            return multiply(rows_NX, oriented(self.core), assigned)
        U_E = _own(self.U_E).to(rows_NX.dtype)
        return mix_and_multiply(rows_NX, U_E, oriented(self.core), assigned)

    def _save_to_state_dict(self, *args: Any) -> None:  # noqa: ANN401
        """As stored: files have matrices row by row."""
        for parameter in self.parameters():
            if not parameter.is_contiguous():
                with torch.inference_mode(mode=parameter.is_inference()):
                    parameter.data = parameter.data.contiguous()
        super()._save_to_state_dict(*args)

    def with_bias(self, rows_NH: Tensor, assigned: Assignments) -> Tensor:
        """Add to every row the bias of its expert, if there is one."""
        if self.bias is None:
            return rows_NH
        bias_EH = (
            self.bias
            if isinstance(self.bias, Tensor)
            else pad_sequence(list(self.bias), batch_first=True)
        )
        bias_EH = functional.pad(bias_EH, (0, rows_NH.shape[1] - bias_EH.shape[1]))
        own_NH = bias_EH.to(rows_NH.dtype)[assigned.experts_N.clamp_max(len(bias_EH) - 1)]
        return assigned.own_rows(rows_NH + own_NH)


def _own(tensor: Tensor) -> Tensor:
    """Local part of a tensor that a framework has split (a DTensor)."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _parameter(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)


class TuckerGroup(nn.Module):
    """The three projections of one group of experts.

    Args:
        tensors: Its tensors by their names, relative to the group.
    """

    def __init__(self, tensors: Mapping[TensorName, Tensor]) -> None:
        super().__init__()
        for owner in (*Projection, SHARED_U_I):
            own = {name: value for name, value in tensors.items() if name.owner == owner}
            if own:
                self.add_module(owner, TuckerStack(own))

    def stack(self, projection: Projection) -> TuckerStack:
        """The stack of a projection."""
        module = getattr(self, projection.value)
        if not isinstance(module, TuckerStack):
            raise TypeError(f"{projection} is not a TuckerStack")
        return module

    def hidden_factor(self, projection: Projection) -> Tensor | None:
        """U_I of a projection, its own or the shared one."""
        own = self.stack(projection).U_I
        if own is None and projection in GATE_UP and hasattr(self, SHARED_U_I):
            shared: TuckerStack = getattr(self, SHARED_U_I)
            return shared.U_I
        return own


class TuckerExperts(nn.Module):
    """The routed experts of one layer.

    Args:
        groups: Tensors of every group by their names relative to it, in any floating dtype, whole
            or the slices of one process; GEMMs run in the dtype of the tokens.
        group_size: Experts in a group.
        activation: From gate and up to neurons.
        exchange: Communication of the layout; by default this process has everything.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[TensorName, Tensor]],
        *,
        group_size: int,
        activation: Activation,
        exchange: Exchange | None = None,
    ) -> None:
        super().__init__()
        self.groups = [TuckerGroup(tensors) for tensors in groups]
        for index, group in enumerate(self.groups):
            self.add_module(group_module(index), group)
        self.group_size = group_size
        self.activation = activation
        self.exchange = exchange or Exchange()

    def forward(self, x_TI: Tensor, experts_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
        """Routed output of this process's tokens, shape (T, I).

        Args:
            x_TI: Tokens, shape (T, I).
            experts_Tk: Experts of every token, shape (T, k).
            weights_Tk: Their weights, shape (T, k).
        """
        tokens = Tokens([x_TI], experts_Tk, weights_Tk)
        tokens, hidden_combines = dispatch_all(self.exchange.hidden_steps, tokens)
        low, places = self._low(tokens.vectors[0])
        tokens, latent_combines = dispatch_all(
            self.exchange.latent_steps, tokens._replace(vectors=low)
        )
        assigned = [
            assign(tokens.experts_Tk, range(start, start + self.group_size))
            for start in range(0, len(self.groups) * self.group_size, self.group_size)
        ]
        neurons = self._gate_up([tokens.vectors[place] for place in places], assigned)
        outputs = self._down(neurons, assigned, tokens.weights_Tk)
        output_TI = self._complete(outputs, [*latent_combines, *hidden_combines])
        return self._with_down_bias(output_TI, experts_Tk, weights_Tk)

    def _low(self, x_TI: Tensor) -> tuple[list[Tensor], list[int]]:
        """Project tokens to latent space, once per distinct U_I of gate and up.

        Returns:
            The projections, and the index of that of gate and of up of every group.
        """
        factors: list[Tensor | None] = []
        places = []
        for group in self.groups:
            for projection in GATE_UP:
                own = group.hidden_factor(projection)
                known = [place for place, factor in enumerate(factors) if factor is own]
                places.append(known[0] if known else len(factors))
                if not known:
                    factors.append(own)
        low = [
            self.exchange.own_hidden(x_TI)
            if U_I is None
            else gemm(x_TI, by_columns(U_I).to(x_TI.dtype))
            for U_I in factors
        ]
        return low, places

    def _gate_up(self, low: Sequence[Tensor], assigned: list[Assignments]) -> list[Tensor]:
        """Activated neurons of every group, each (N, H) or the process's own columns of it.

        Args:
            low: Projected tokens for gate and for up of every group.
            assigned: Rows of every group.
        """
        middles, factors = [], []
        own = iter(low)
        for group, rows in zip(self.groups, assigned, strict=True):
            chosen: dict[int, Tensor] = {}  # gate and up may read the same
            for projection in GATE_UP:
                stack, low_TR = group.stack(projection), next(own)
                if id(low_TR) not in chosen:
                    chosen[id(low_TR)] = low_TR.index_select(0, rows.tokens_N)
                low_NR = chosen[id(low_TR)]
                middles.append(stack.multiply(low_NR, rows, transposed=False))
                factors.append(None if stack.U_H is None else _own(stack.U_H))
        completed = self.exchange.gate_up(middles, [factor is not None for factor in factors])
        expanded = [
            middle if factor is None else gemm(middle, factor.to(middle.dtype).T)
            for middle, factor in zip(completed, factors, strict=True)
        ]
        stacks = [
            (group.stack(projection), rows)
            for group, rows in zip(self.groups, assigned, strict=True)
            for projection in GATE_UP
        ]
        biased = [
            stack.with_bias(rows_NH, rows)
            for rows_NH, (stack, rows) in zip(expanded, stacks, strict=True)
        ]
        return [
            self.activation(gate, up) for gate, up in zip(biased[0::2], biased[1::2], strict=True)
        ]

    def _down(
        self, neurons: list[Tensor], assigned: list[Assignments], weights_Tk: Tensor
    ) -> list[Tensor]:
        """Weighted sums over the experts of every group, each (T, r_I), before U_I."""
        stacks = [group.stack(Projection.DOWN) for group in self.groups]
        middles = [
            h_NH if stack.U_H is None else gemm(h_NH, _own(by_columns(stack.U_H)).to(h_NH.dtype))
            for h_NH, stack in zip(neurons, stacks, strict=True)
        ]
        completed = self.exchange.down(middles, [stack.U_H is not None for stack in stacks])
        return [
            rows.sum_over_experts(stack.multiply(middle, rows, transposed=True), weights_Tk)
            for middle, stack, rows in zip(completed, stacks, assigned, strict=True)
        ]

    def _complete(self, outputs: Sequence[Tensor], combines: Sequence[Combine]) -> Tensor:
        """Combine: return the outputs in latent or hidden space, whichever moves less."""
        factors = [group.hidden_factor(Projection.DOWN) for group in self.groups]
        low = self.exchange.latent_output
        outputs = outputs if low else [_expand(outputs, factors)]
        for combine in combines:
            outputs = combine(outputs)
        return _expand(outputs, factors) if low else outputs[0]

    def _with_down_bias(self, output_TI: Tensor, experts_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
        """Add the weighted biases of down of each token's experts, where the token came from."""
        biases = [group.stack(Projection.DOWN).bias for group in self.groups]
        whole = [bias for bias in biases if isinstance(bias, Tensor)]
        if not whole:
            return output_TI
        bias_EI = torch.cat(whole).to(output_TI.dtype)
        count = len(bias_EI)
        elsewhere_Tk = (experts_Tk < 0) | (experts_Tk >= count)
        places_Tk = experts_Tk.long().masked_fill(elsewhere_Tk, count)
        shares_TE = bias_EI.new_zeros(len(experts_Tk), count + 1)
        shares_TE = shares_TE.scatter_add(1, places_Tk, weights_Tk.to(bias_EI.dtype))
        return output_TI + shares_TE[:, :count] @ bias_EI


def _expand(outputs: Sequence[Tensor], factors: list[Tensor | None]) -> Tensor:
    """Sum over groups of their outputs in hidden space."""
    expanded = [
        output if factor is None else gemm(output, factor.to(output.dtype).T)
        for output, factor in zip(outputs, factors, strict=True)
    ]
    return torch.stack(expanded).sum(0)
