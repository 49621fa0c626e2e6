"""How an object moves as a whole and in parts that stay in one piece, read from noise and said by few numbers.

A limb that swings moves by one affine map of its rest positions. Found by least squares from all of its pixels, it stands out of
noise in which no pixel's own motion can be seen, and the network need only say which pixels belong together.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DOUBTED = 3.0  # standard deviations of the noise up to which a fit's coefficient says nothing
BOUND = 24.0  # of the facts' length, twice the usual: no layer can be trained on those of a far turn in little noise
REACH = 4.0  # of the network's own maps: a turn's are several times as large as what its layers are used to
Layer = TypeVar("Layer", bound=nn.Module)


def zero(layer: Layer) -> Layer:
    """Zero parameters: a residual branch that starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def affine_fits(noisy: Tensor, functions: Tensor, shares: Tensor, snr: Tensor) -> tuple[Tensor, Tensor]:
    """The affine maps of position that fit a noisy latent best, one for each part of the object.

    The noise of a part's many cells averages out in them: a spin can be read from them long before any pixel shows it.

    Args:
        noisy: [B, P, C] of P places; functions: [B, P, 4] x, y, z and 1, 0 where the object isn't.
        shares: [B, P, K] of each place in each of K parts.
        snr: [B], the log-SNR.

    Returns:
        fits [B, K, 4, C] of the clean latent, 0 where all is noise; facts [B, K, 4 C + 16] of about unit size, together
        within `BOUND`: the fits in orthonormal functions, and the part's moments.
    """
    signal, noise = torch.sigmoid(snr)[:, None, None, None], torch.sigmoid(-snr)[:, None, None, None]
    weighted = (shares[..., None] * functions[:, :, None]).flatten(2).mT  # [B, 4 K, P]
    gram = (weighted @ functions).unflatten(1, (-1, 4))
    pixels = gram[..., 3:, 3:].clamp(min=1)  # [B, K, 1, 1]
    gram = gram / pixels
    root = torch.linalg.cholesky(gram + 1e-3 * torch.eye(4, device=gram.device))
    moments = (weighted @ noisy).unflatten(1, (-1, 4)) / pixels.sqrt()
    white = torch.linalg.solve_triangular(root, moments, upper=False)  # noise of unit variance, or less
    # What may well be noise is left out (Breiman 1995, the non-negative garrote), the rest is filtered as Wiener would a
    # latent of unit variance.
    trusted = white * (1 - DOUBTED**2 * noise / white.square().clamp(min=1e-12)).clamp(min=0)
    fits = torch.linalg.solve_triangular(root.mT, trusted / pixels.sqrt(), upper=True)
    fits = fits * signal.sqrt() * pixels / (signal * pixels + noise)
    white = white * (signal * pixels + noise) ** -0.5
    facts = torch.cat([white.flatten(2), gram.flatten(2)], 2)
    return fits, facts * (BOUND / facts.norm(dim=2, keepdim=True).clamp(min=BOUND))


def cells(maps: Tensor, side: int) -> Tensor:
    """[B, V, C, H, W] as one row for each square of `side` pixels, independent noise of unit variance still so: [B, P, C]."""
    return (F.avg_pool2d(maps.flatten(0, 1), side) * side).unflatten(0, maps.shape[:2]).permute(0, 1, 3, 4, 2).flatten(1, 3)


class Look(NamedTuple):
    """What a noisy latent shows of the whole object.

    Attributes:
        functions: [B, V, 4, H, W] rest position and 1, 0 where the object isn't.
        rows: [B, P, C], the latent in cells.
        snr: [B], the log-SNR.
        fits: [B, 1, 4, C] and facts: [B, 1, 4 C + 16] of `affine_fits`.
    """

    functions: Tensor
    rows: Tensor
    snr: Tensor
    fits: Tensor
    facts: Tensor


class PartMotion(nn.Module):
    """Motion as a sum of parts that move as one piece: soft shares of pixels, and an affine map of rest positions for each.

    The first part is the whole object; the shares of the others are found by the network, whose last feature they are read from.
    """

    HIDDEN = 256

    def __init__(self, parts: int, latent: int, embedding: int, detail: int, fine: int, coarse: int) -> None:
        """Args: parts beside the whole; channels of the latent, of the embedding and of the features given to `forward`."""
        super().__init__()
        self.latent = latent
        facts = 4 * latent + 16
        self.to_embedding = zero(nn.Linear(facts + 6, embedding))
        self.share = nn.Conv2d(detail, 1 + parts, 1)
        self.inside = nn.Linear(facts + embedding + fine + coarse, self.HIDDEN)
        self.between = nn.Linear(self.HIDDEN, self.HIDDEN)
        self.out = zero(nn.Linear(self.HIDDEN, 5 * latent))

    def look(self, noisy: Tensor, position: Tensor, mask: Tensor, snr: Tensor, cell: int) -> tuple[Look, Tensor]:
        """What the latent shows of the whole object, and that as an embedding for all blocks of the network, [B, E].

        Args:
            noisy: [B, V, C, H, W]; position: [B, V, 3, H, W] at rest; mask: [B, V, 1, H, W]; snr: [B], the log-SNR.
            cell: pixels along a side of the squares that parts are made of.
        """
        with torch.autocast(noisy.device.type, enabled=False):
            functions = torch.cat([position, torch.ones_like(mask)], 2) * mask
            rows, places = cells(noisy.float() * mask, cell), cells(functions, cell)
            fits, facts = affine_fits(rows, places, torch.ones_like(places[..., :1]), snr)
        far = 9.0 * (1 - mask)  # beyond every box
        box = (position + far).amin((1, 3, 4)), (position - far).amax((1, 3, 4))
        return Look(functions, rows, snr, fits, facts), self.to_embedding(torch.cat([facts[:, 0], *box], 1))

    def forward(self, look: Look, embedding: Tensor, detail: Tensor, fine: Tensor, coarse: Tensor) -> Tensor:
        """
        Args:
            look: of `look`; embedding: [B, E].
            detail: [B * V, channels, 2 h, 2 w], from which shares are read; fine: [B * V, channels, h, w]; coarse: [B, channels].

        Returns:
            the clean latent's part that moves as one piece, or as several, [B, V, C, H, W].
        """
        functions = look.functions
        batch, views, _, height, width = functions.shape
        shares = torch.softmax(self.share(detail), 1)[:, 1:]
        side = width // shares.shape[-1]
        with torch.autocast(detail.device.type, enabled=False):
            flat = shares.detach().float().unflatten(0, (batch, views)).permute(0, 1, 3, 4, 2).flatten(1, 3)
            fits, facts = affine_fits(look.rows, cells(functions, side), flat, look.snr)
            fits, facts = torch.cat([look.fits, fits], 1), torch.cat([look.facts, facts], 1)
        small = F.avg_pool2d(shares, shares.shape[-1] // fine.shape[-1])
        small = torch.cat([torch.ones_like(small[:, :1]), small], 1).flatten(2).unflatten(0, (batch, views))
        pooled = torch.einsum("bvkp,bvcp->bkc", small, fine.flatten(2).unflatten(0, (batch, views)))
        pooled = pooled / small.sum((1, 3))[..., None].clamp(min=1e-3)
        about = torch.cat([embedding, coarse], 1)[:, None].expand(-1, len(facts[0]), -1)
        h = F.silu(self.inside(torch.cat([facts, about, pooled], 2)))
        maps, trust = self.out(F.silu(self.between(h))).split([4 * self.latent, self.latent], 2)
        maps = REACH * maps.unflatten(2, (4, self.latent)) + trust[:, :, None] * fits  # [B, 1 + K, 4, C]
        places = functions.permute(0, 1, 3, 4, 2)  # [B, V, H, W, 4]
        large = F.interpolate(shares, scale_factor=float(side), mode="nearest")
        large = large.unflatten(0, (batch, views)).permute(0, 1, 3, 4, 2)
        weighted = torch.cat([places, (large[..., None] * places[..., None, :]).flatten(4)], 4)
        moved = weighted.flatten(1, 3) @ maps.flatten(1, 2)
        return moved.view(batch, views, height, width, -1).permute(0, 1, 4, 2, 3)
