"""Volume contrast: tell from two crops' embeddings how much they overlap (arXiv 2402.17300).

Reproduced: base crops on a grid and target crops anywhere in a patch are embedded by the encoder
(mean of every stage's output, concatenated) and a projection head; the cosine of a target and a
base crop, cut at 0, predicts the share of the target that lies in the base. L_pos + L_neg compare
it with the truth, L_reg pushes base crops apart. A momentum teacher embeds the other side of each
pair, as in the authors' code (the version with a teacher).

`parity = "nnssl"` is what nnssl runs: no teacher, L_reg not squared, L_neg counted over the batch,
the head's norm over each crop.
The differences are a table in docs/methods/voco.md.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from voxelbridge.core.arch.config import Triple
from voxelbridge.core.arch.encoder import PlainEncoder, ResEncoder
from voxelbridge.core.config import Config
from voxelbridge.core.data.augment_intensity import IntensityAugmentation, IntensityParams
from voxelbridge.pretrain_ssl.momentum_teacher import MomentumTeacher
from voxelbridge.pretrain_ssl.panels import Panel, Picture
from voxelbridge.pretrain_ssl.voco_crops import (
    base_starts,
    crop_size,
    cut_crops,
    overlap_fractions,
    random_orientations,
    random_starts,
)
from voxelbridge.pretrain_ssl.voco_losses import (
    at_least_float32,
    base_similarity,
    cosines,
    overlap_loss,
)

CITATIONS = (
    "Wu et al., VoCo: A Simple-yet-Effective Volume Contrastive Learning Framework for 3D Medical "
    "Image Analysis, CVPR 2024 (arXiv 2402.17300)",
    "Wu et al., Large-Scale 3D Medical Image Pre-training with Geometric Context Priors "
    "(arXiv 2410.09890)",
    "Wald et al., An OpenMind for 3D medical vision self-supervised learning (arXiv 2412.17041)",
)

NORM_EPS = 1e-5

Fraction = Annotated[float, Field(ge=0, le=1)]
Axis = Literal[0, 1, 2]  # 0 = z
Parity = Literal["paper", "nnssl"]


class VoCo(Config):
    """Settings of the method, and how they become an objective and views of a patch.

    The patch is what the base crops tile; the encoder sees single crops.
    """

    name: Literal["voco"] = "voco"
    parity: Parity = "paper"
    base_grid: tuple[PositiveInt, PositiveInt, PositiveInt] = (3, 3, 1)  # crops along z, y, x
    target_crops: PositiveInt = 4
    teacher: Literal["auto", "momentum", "none"] = "auto"  # auto: momentum in "paper" alone
    teacher_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9  # per forward pass
    head_width: PositiveInt = 2048  # of the projection head's three layers
    head_norm: Literal["auto", "volume", "crop"] = "auto"  # auto: volume in "paper" alone
    intensity: IntensityAugmentation = IntensityAugmentation.voco()  # of each crop
    mirror_probability: Fraction = 0.5  # of each axis of a crop
    rot90_probability: Fraction = 0.3  # of 1 to 3 quarter turns of a crop
    rot90_axes: tuple[Axis, Axis] = (0, 1)  # the plane of the turns

    @property
    def citations(self) -> tuple[str, ...]:
        """Whom to cite."""
        return CITATIONS

    @property
    def used_masks(self) -> tuple[str, ...]:
        """No stored mask."""
        return ()

    @property
    def has_teacher(self) -> bool:
        """Whether a momentum teacher embeds the other side of each pair."""
        return self.teacher == "momentum" or (self.teacher == "auto" and self.parity == "paper")

    @property
    def reads_voxels(self) -> bool:
        """Whether `views` looks at the values of the patch, not at its shape alone."""
        return False

    def network_input(self, patch_size: Triple) -> Triple:
        """The size that the encoder sees: one crop."""
        return crop_size(patch_size, self.base_grid)

    def check_patch(self, patch_size: Triple) -> None:
        """ValueError unless the grid divides the patch into crops that the settings can turn."""
        crop = crop_size(patch_size, self.base_grid)
        if self.base_grid == (1, 1, 1):
            raise ValueError("base_grid [1, 1, 1] leaves nothing to tell apart; take two or more")
        first, second = self.rot90_axes
        if self.rot90_probability > 0 and (first == second or crop[first] != crop[second]):
            raise ValueError(
                f"crops of {list(crop)} cannot be turned in the plane of the axes "
                f"{[first, second]}; take another rot90_axes, or rot90_probability = 0"
            )

    def views(
        self,
        patch: NDArray[np.float32],
        rng: np.random.Generator,
        *,
        masks: Mapping[str, NDArray[np.uint8]],
    ) -> dict[str, NDArray[Any]]:
        """`image` (C, D, H, W), where its crops are and what happens to them; n base, k target.

        `starts` (n + k, 3) int64, base crops first; `overlap` (k, n); `orientation` (n + k, 4)
        int64 and `intensity` (n + k, C, 12), which only training uses.
        """
        del masks
        channels, depth, height, width = patch.shape
        crop = self.network_input((depth, height, width))
        bases = base_starts(self.base_grid, crop)
        targets = random_starts(rng, self.target_crops, patch_size=patch.shape[1:], crop=crop)
        count = len(bases) + len(targets)
        return {
            "image": patch,
            "starts": np.concatenate([bases, targets]),
            "overlap": overlap_fractions(targets, bases, crop),
            "orientation": random_orientations(
                rng, count, mirror=self.mirror_probability, rot90=self.rot90_probability
            ),
            "intensity": self.intensity.sample_batch(rng, count, channels).to_array(),
        }

    def build(self, encoder: ResEncoder | PlainEncoder) -> "VoCoObjective":
        """The encoder with a projection head and, where asked, their teacher."""
        by_parity = "volume" if self.parity == "paper" else "crop"
        norm = by_parity if self.head_norm == "auto" else self.head_norm
        return VoCoObjective(
            encoder,
            ProjectionHead(sum(encoder.channels), self.head_width, norm=norm),
            base_grid=self.base_grid,
            parity=self.parity,
            teacher_momentum=self.teacher_momentum if self.has_teacher else None,
            rot90_axes=self.rot90_axes,
        )


class ProjectionHead(nn.Module):
    """(B, M, in_features) -> (B, M, width) for M crops: Linear, norm, ReLU, twice, and a Linear.

    The norm has no weights and takes its mean and deviation over the values of one crop, or of
    each value over the crops of one volume.
    """

    def __init__(self, in_features: int, width: int, *, norm: Literal["crop", "volume"]) -> None:
        super().__init__()
        self.first = nn.Linear(in_features, width)
        self.second = nn.Linear(width, width)
        self.third = nn.Linear(width, width)
        self._axis = -1 if norm == "crop" else 1

    def forward(self, features: Tensor) -> Tensor:
        x = self._normalized(self.first(features)).relu()
        return self.third(self._normalized(self.second(x)).relu())

    def _normalized(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(
            at_least_float32(x), dim=self._axis, correction=0, keepdim=True
        )
        return (x - mean) * torch.rsqrt(variance + NORM_EPS)


class VoCoObjective(nn.Module):
    """Encoder and projection head; `forward` gives the losses. There is no decoder.

    The teacher, if any, follows encoder and head at the start of every forward pass in training
    mode. In inference mode it stays as it is, and crops are not augmented.
    """

    decoder = None
    decoder_config = None

    def __init__(
        self,
        encoder: ResEncoder | PlainEncoder,
        head: ProjectionHead,
        *,
        base_grid: Triple,
        parity: Parity,
        teacher_momentum: float | None,
        rot90_axes: tuple[int, int],
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.teacher = None
        if teacher_momentum is not None:
            self.teacher = MomentumTeacher(encoder, head, momentum=teacher_momentum)
            # Every rank makes the same update: no need to send the teacher around at each step.
            names = [f"teacher.{name}" for name, _ in self.teacher.named_buffers()]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, names)
        self._grid = base_grid
        self._parity: Parity = parity
        self._rot90_axes = rot90_axes

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses of a batch of `VoCo.views`: "total" = "overlap" + "similarity".

        "overlap" = "positive" + "negative", which compare the predicted overlap with the true one.
        """
        cut = self._crops
        if torch.compiler.is_compiling():  # places are host numbers: each would compile anew
            cut = torch.compiler.disable(cut)
        crops: Tensor = cut(batch, augmented=self.training)  # pyright: ignore[reportCallIssue] torch leaves the signature out
        if self.teacher is not None and self.training:
            self.teacher.update(self.encoder, self.head)
        bases, targets = self._embed(crops, self.encoder, self.head)
        predicted = self._predict(crops, bases, targets)
        loss = overlap_loss(predicted, batch["overlap"], counts=self._counts)
        similarity = base_similarity(bases, form=self._parity)
        return {
            "total": loss.sum + similarity,
            "overlap": loss.sum,
            "positive": loss.positive,
            "negative": loss.negative,
            "similarity": similarity,
        }

    def trivial(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss of predicting 1/n for every base crop, the mean overlap with one of n.

        It pays nothing for similar base crops, so that a "total" below it means that "overlap" is
        below it too; "overlap" alone may be compared with it as well.
        """
        overlap = batch["overlap"]
        chance = torch.full_like(overlap, 1 / overlap.shape[2])
        return overlap_loss(chance, overlap, counts=self._counts).sum

    @torch.no_grad()
    def pictures(self, batch: dict[str, Tensor]) -> Picture:
        """Predicted and true overlap (k, n) of the first patch, its crops as they are."""
        first = {name: value[:1] for name, value in batch.items()}
        crops = self._crops(first, augmented=False)
        predicted = self._predict(crops, *self._embed(crops, self.encoder, self.head))
        panels = (("true overlap", first["overlap"]), ("predicted overlap", predicted))
        return Picture(
            "overlap",
            tuple(Panel(name, values[0].float().cpu().numpy()) for name, values in panels),
        )

    @property
    def _counts(self) -> Literal["volume", "batch"]:
        return "batch" if self._parity == "nnssl" else "volume"

    def _crops(self, batch: dict[str, Tensor], *, augmented: bool) -> Tensor:
        """All crops (B, n + k, C, *crop): base crops first."""
        image = batch["image"]
        depth, height, width = image.shape[2:]
        crop = crop_size((depth, height, width), self._grid)
        starts = batch["starts"].cpu().numpy()
        if not augmented:
            return cut_crops(image, starts, crop)
        crops = cut_crops(
            image,
            starts,
            crop,
            orientations=batch["orientation"].cpu().numpy(),
            turned_axes=self._rot90_axes,
        )
        params = IntensityParams.from_array(batch["intensity"].flatten(0, 1).cpu().numpy())
        return params.apply(crops.flatten(0, 1)).view(crops.shape)

    def _embed(self, crops: Tensor, encoder: nn.Module, head: nn.Module) -> tuple[Tensor, Tensor]:
        """Embeddings of the base (B, n, E) and the target crops (B, k, E), in one pass."""
        stages = encoder(crops.flatten(0, 1))
        # the mean in float32 without a copy of the map in it
        means = [
            stage.mean(dim=(2, 3, 4), dtype=torch.promote_types(stage.dtype, torch.float32))
            for stage in stages
        ]
        embeddings = head(torch.cat(means, dim=1).unflatten(0, crops.shape[:2]))
        num_bases = int(np.prod(self._grid))
        return embeddings[:, :num_bases], embeddings[:, num_bases:]

    def _predict(self, crops: Tensor, bases: Tensor, targets: Tensor) -> Tensor:
        """Predicted overlap (B, k, n) from the students' embeddings of the crops."""
        if self.teacher is None:
            return cosines(targets, bases.detach())
        if not self.training and not self.teacher.started:  # nothing learnt: it is the student
            return cosines(targets, bases)
        with torch.no_grad():
            steady_bases, steady_targets = self._embed(crops, *self.teacher.parts)
        return (cosines(targets, steady_bases) + cosines(steady_targets, bases)) / 2
