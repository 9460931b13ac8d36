"""Memory of a layer that is profiled, or calibrated and compressed: estimates, from shapes.

A layer's dense experts are in memory while they are worked on, or each is read whenever it is used.
`benchmarks/full_width.py` and `benchmarks/wide_layer.py` measure both.
"""

from __future__ import annotations

from dataclasses import dataclass

from tuckerize.calibration.probes import num_probe_windows
from tuckerize.calibration.refine import batch_and_steps
from tuckerize.calibration.rounding import ROUNDED_OUTPUTS
from tuckerize.calibration.spectra import ROW_VALUES, column_step
from tuckerize.calibration.tokens import PART_TOKENS, enough_tokens
from tuckerize.compression.closed_form import TOKENS_AT_ONCE
from tuckerize.compression.parts import has_parts
from tuckerize.compression.target import CompressionTarget, LayerPiece
from tuckerize.domain import Projection, StackShape
from tuckerize.linalg.quantise import SCALE_VALUES
from tuckerize.linalg.selection import CHUNK_VALUES
from tuckerize.planning.closed_form_memory import closed_form_values
from tuckerize.planning.plan import Plan

# float32, the work type, and float64.
_WORK_BYTES = 4
_EXACT_BYTES = 8
# Copies of matrices that are alive at once, as measured.
_ROUTED_ROWS = (2, 3)  # rows of I and of H values of the tokens' experts
_PART_ROWS = (1, 7)  # the same of a part of one expert's tokens
_ELIMINATION_COPIES = 6
_SPECTRUM_COPIES = 11
_READ_COPIES = 5
_ROUNDING_COPIES = (5, 7)  # moments and matrices of gate or up, while columns are rounded
_SCALES_COPIES = (1, 4, 3)  # the same and normal equations in float64, while scales are fitted
_PROBED_MATRICES = 6  # of an expert that a profile rounds: dense, and as they are read
_STATES_COPIES = 8  # hidden states, tokens and outputs of the calibration set
_COPIES_BESIDE_FILES = 2  # of these, while files hold what stays
_KEPT = 1.08  # of what is alive, with what the allocator keeps of what was freed
_SMALLEST_GROUP = 32  # inputs that share a scale


@dataclass(frozen=True, slots=True)
class LayerWork:
    """A layer and the tokens that it is calibrated with.

    Attributes:
        shape: Sizes (E, H, I) of the layer's stacks, of this process's experts.
        tokens: Tokens of the calibration set.
        window: Tokens of a window.
        top_k: Experts of a token.
        layers: Layers of the model that are profiled.
        states_held: Whether hidden states, tokens and outputs are in memory, or in files.
    """

    shape: StackShape
    tokens: int
    window: int
    top_k: int
    layers: int = 1
    states_held: bool = True

    def profile_bytes(self, *, spectra: bool, held: bool) -> int:
        """Peak bytes while the layer is profiled, beside those of the process.

        Args:
            spectra: Whether modes may be truncated.
            held: Whether the dense experts are in memory.
        """
        hidden = self.shape.hidden
        spectrum = 0
        if spectra:
            values = self.shape.parameters // column_step(self.shape)
            rows = min(ROW_VALUES, values) * _WORK_BYTES
            spectrum = _SPECTRUM_COPIES * hidden**2 * _EXACT_BYTES + rows
        moments = 2 * hidden**2 * _WORK_BYTES
        outputs = min(self.shape.intermediate, ROUNDED_OUTPUTS)
        probed = self.rounding(outputs) + self._beside_rounding
        after = moments + max(self.moments, spectrum, probed)
        dense = self._dense if held else self._read
        return dense + self._states + self._probes + max(self.forward, after)

    def compression_bytes(self, piece: LayerPiece) -> int:
        """Peak bytes while the layer is compressed with its dense experts in memory.

        The most of the elimination of neurons, the closed form of a group beside the factors of the
        others, the dense outputs, the gradient steps, and the encoding of the cores.

        Args:
            piece: Its piece, of which all groups have one target.
        """
        target, groups = piece.targets[0], len(piece.targets)
        group = self._group(piece)
        factors = piece.stored_parameters(group)
        of_group = closed_form_values(group, target, self.fitted_rows(target, groups))
        alive = max(
            factors - factors // groups + of_group,
            factors + self._rows(self.shape.intermediate, self.shape.hidden),
            self.refinement(piece),
        )
        eliminated = self.moments if target.neurons < group.intermediate else 0
        encoded = 0
        if piece.cores is not None:  # the cores before and after, and codes
            encoded = factors * (2 * _WORK_BYTES + 1) + self.rounding(group.intermediate)
        alive = max(alive * _WORK_BYTES, eliminated, encoded)
        return int(_KEPT * (self._dense + self._states + alive))

    def refinement(self, piece: LayerPiece) -> int:
        """Values of the gradient steps: parameters, their start, gradients, and Adam's moments."""
        group, target = self._group(piece), piece.targets[0]
        factors = piece.stored_parameters(group)
        if piece.calibration is None or not piece.calibration.refine:
            return 2 * factors
        batch, _ = batch_and_steps(self.tokens, piece.calibration.refine)
        rows = batch * self.top_k * (_latent(target) + 3 * target.neurons)
        mixed = len(piece.targets) * sum(  # matrices of experts that share cores
            len(coupling) * group.experts * rank.intermediate * rank.hidden
            for coupling, rank in target.ranks.items()
            if rank.expert < group.experts
        )
        gradient = mixed // len(Projection)
        return 5 * factors + rows + mixed + gradient

    def fitted_rows(self, target: CompressionTarget, groups: int = 1) -> int:
        """Values of one expert's tokens, or of those that run through a compressed group."""
        return max(self._expert_rows, self._rows(target.neurons, _latent(target)) // groups)

    def _rows(self, neurons: int, hidden: int) -> int:
        """Values of running tokens through experts: neurons, or outputs and their sum."""
        rows = min(self.tokens, TOKENS_AT_ONCE) * self.top_k
        return rows * max(4 * neurons + hidden, neurons + 3 * hidden)

    def _group(self, piece: LayerPiece) -> StackShape:
        """Sizes of the stacks of one group."""
        return self.shape._replace(experts=self.shape.experts // len(piece.targets))

    def parts_bytes(self, piece: LayerPiece, stored: int, processes: int = 1) -> int:
        """Peak bytes while the layer is compressed expert by expert.

        Args:
            piece: Its piece.
            stored: Bytes that are stored of its groups, by the first process.
            processes: Processes that share the experts.
        """
        experts, _, hidden = self.shape
        codes = len(Projection) * experts * piece.targets[0].neurons * hidden
        whole = processes * codes if processes > 1 else 0  # of all of them, gathered
        written = codes + whole + 2 * stored  # packed, and their copy in the writer
        measured = codes + stored + self.forward
        alive = max(self.moments, codes + self.rounding(self.shape.intermediate), measured, written)
        return self._read + self._states + alive

    @property
    def _dense(self) -> int:
        """Bytes of the dense experts."""
        return len(Projection) * self.shape.parameters * _WORK_BYTES

    @property
    def _read(self) -> int:
        """Bytes of dense matrices that are being read."""
        return _READ_COPIES * self.shape.intermediate * self.shape.hidden * _WORK_BYTES

    @property
    def _states(self) -> int:
        """Bytes of hidden states, tokens and outputs."""
        copies = _STATES_COPIES if self.states_held else _COPIES_BESIDE_FILES
        return copies * self.tokens * self.shape.hidden * _WORK_BYTES

    @property
    def _probes(self) -> int:
        """Bytes of the hidden states of the models with one layer changed, two for each layer."""
        if not self.states_held:
            return 0
        of_layer = min(self.tokens, num_probe_windows(self.layers) * self.window)
        return 2 * (self.layers - 1) * of_layer * self.shape.hidden * _WORK_BYTES

    @property
    def forward(self) -> int:
        """Bytes of running the windows of a probe, which are the most, through the experts."""
        rows = min(self.tokens, num_probe_windows(layers=1) * self.window) * self.top_k
        of_hidden, of_neurons = _ROUTED_ROWS
        values = of_hidden * self.shape.hidden + of_neurons * self.shape.intermediate
        return rows * values * _WORK_BYTES

    @property
    def tokens_of_expert(self) -> int:
        """Tokens that an expert is fitted to."""
        routed = self._routed
        return max(routed, min(routed + self.tokens, enough_tokens(self.shape)))

    @property
    def _routed(self) -> int:
        """Tokens of an expert where all have equally many."""
        return self.tokens * self.top_k // self.shape.experts

    @property
    def _expert_rows(self) -> int:
        """Values of the tokens of one expert, with neurons and derivatives of a part of them."""
        of_hidden, of_neurons = _PART_ROWS
        _, neurons, hidden = self.shape
        part = min(self.tokens_of_expert, PART_TOKENS)
        return self.tokens_of_expert * hidden + part * (of_hidden * hidden + of_neurons * neurons)

    @property
    def moments(self) -> int:
        """Bytes of the moments of neurons, and of their elimination."""
        experts, neurons, hidden = self.shape
        chunk = min(experts, max(1, CHUNK_VALUES // neurons**2))
        rows = self._expert_rows * _WORK_BYTES
        eliminated = _ELIMINATION_COPIES * chunk * neurons**2 * _EXACT_BYTES
        waiting = 2 * chunk * neurons**2 + neurons * hidden
        return waiting * _WORK_BYTES + max(rows, eliminated)

    @property
    def _beside_rounding(self) -> int:
        """Bytes that a profile has beside: a moment, matrices, the tokens to fit, the expert's."""
        _, neurons, hidden = self.shape
        rows = hidden + _PROBED_MATRICES * neurons + self.tokens + self.tokens_of_expert
        return rows * hidden * _WORK_BYTES

    def rounding(self, neurons: int) -> int:
        """Bytes of rounding gate and up of so many neurons of an expert for its inputs."""
        hidden = self.shape.hidden
        of_moment, of_matrix = _ROUNDING_COPIES
        rounded = (of_moment * hidden**2 + of_matrix * neurons * hidden) * _WORK_BYTES
        of_moment, of_matrix, of_equations = _SCALES_COPIES
        groups = -(-hidden // _SMALLEST_GROUP)
        equations = min(SCALE_VALUES, 2 * neurons * groups**2)
        fitted = (of_moment * hidden**2 + of_matrix * neurons * hidden) * _WORK_BYTES
        fitted += of_equations * equations * _EXACT_BYTES
        rows = self.tokens_of_expert * hidden * _WORK_BYTES
        return max(rounded, fitted) + rows


def _latent(target: CompressionTarget) -> int:
    """Largest size of the hidden mode."""
    return max(rank.hidden for rank in target.ranks.values())


def has_parts_of(plan: Plan) -> bool:
    """Whether all calibrated layers of a plan can be compressed expert by expert."""
    return all(
        has_parts(piece, plan.group_shape) and not piece.calibration.refine
        for piece in plan.layer_pieces
        if piece.calibration is not None
    )
