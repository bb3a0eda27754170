"""Two-parameter item response theory with several abilities, and what it says of a merge from a few answers.

Model m solves item i with probability σ(a_i · θ_m − b_i): θ its abilities, a_i what the item asks of them, b_i how hard it
is. Items' parameters are fitted to the answers of models that were measured on all items (the experts and other
baselines). A merge's ability is taken to be a combination of theirs, θ = Σ λ_k θ_k (MERGE³, arXiv:2502.10436), of
which only the λ are fitted to its few answers; the probabilities of all other items follow.

With few models the fit is under-determined: K models answer each item K times, for 1 + D parameters. Normal priors
decide what the answers leave open (a_i around 1 in the first ability and 0 in the others, θ around 0, b_i around 0), so
what can be expected is an order of the items by how hard they are and which of them go together, not parameters that mean
anything by themselves.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

_STEPS = 300
_SLOPES, _ABILITIES, _DIFFICULTIES, _MIXTURE = 0.5, 1.0, 2.0, 0.5  # standard deviations of the priors


@dataclass(frozen=True)
class ItemResponses:
    """Fitted parameters.

    Attributes:
        slopes: shape (items, abilities).
        difficulties: shape (items,).
        abilities: shape (models, abilities).
    """

    slopes: Matrix
    difficulties: Vector
    abilities: Matrix

    def to_json(self) -> dict[str, Any]:
        """Return plain data: base64 of little-endian float64 and the shapes."""
        return {
            name: [list(found.shape), base64.b64encode(found.astype("<f8").tobytes()).decode()]
            for name, found in (
                ("slopes", self.slopes),
                ("difficulties", self.difficulties),
                ("abilities", self.abilities),
            )
        }

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> ItemResponses:
        """Return what `to_json` wrote, bit for bit."""
        return cls(
            **{
                name: np.frombuffer(base64.b64decode(packed), dtype="<f8").astype(np.float64).reshape(shape)
                for name, (shape, packed) in data.items()
            }
        )

    def probabilities(self, mixture: Vector) -> Vector:
        """Return how likely a merge solves each item, shape (items,), its ability being a mixture, shape (models,)."""
        return np.asarray(expit(self.slopes @ (mixture @ self.abilities) - self.difficulties), dtype=np.float64)


def fit(answers: Matrix, abilities: int) -> ItemResponses:
    """Fit items and models together, by maximum a posteriori (L-BFGS from the answers' means; nothing is random).

    Args:
        answers: shape (models, items), from 0 to 1.
        abilities: dimensions of the ability, at least 1.
    """
    from scipy.optimize import minimize  # here: most jobs estimate nothing

    models, items = answers.shape
    start_theta = _start(answers, abilities)
    start_b = -_logit(answers.mean(axis=0))
    start_a = np.zeros((items, abilities))
    start_a[:, 0] = 1.0
    sizes = np.cumsum([items * abilities, items])

    def unpack(x: Vector) -> tuple[Matrix, Vector, Matrix]:
        a, b, theta = np.split(x, sizes)
        return a.reshape(items, abilities), b, theta.reshape(models, abilities)

    def loss(x: Vector) -> tuple[float, Vector]:
        a, b, theta = unpack(x)
        z = theta @ a.T - b
        p = expit(z)
        likelihood = np.logaddexp(0, z) - answers * z
        away = a - start_prior
        value = likelihood.sum() + (away**2).sum() / (2 * _SLOPES**2) + (b**2).sum() / (2 * _DIFFICULTIES**2)
        value += (theta**2).sum() / (2 * _ABILITIES**2)
        residual = p - answers
        gradient_a = residual.T @ theta + away / _SLOPES**2
        gradient_b = -residual.sum(axis=0) + b / _DIFFICULTIES**2
        gradient_theta = residual @ a + theta / _ABILITIES**2
        return float(value), np.concatenate([gradient_a.ravel(), gradient_b, gradient_theta.ravel()])

    start_prior = start_a.copy()
    x0 = np.concatenate([start_a.ravel(), start_b, start_theta.ravel()])
    found = minimize(loss, x0, jac=True, method="L-BFGS-B", options={"maxiter": _STEPS})
    return ItemResponses(*unpack(np.asarray(found.x, dtype=np.float64)))


def _start(answers: Matrix, abilities: int) -> Matrix:
    """First abilities: how many items a model solves, then the leading directions in which models differ."""
    theta = np.zeros((len(answers), abilities))
    theta[:, 0] = _logit(answers.mean(axis=1))
    theta[:, 0] -= theta[:, 0].mean()
    if abilities > 1:
        centred = answers - answers.mean(axis=0)
        left, strength, _ = np.linalg.svd(centred, full_matrices=False)
        count = min(abilities - 1, left.shape[1])
        signs = np.sign(left[np.abs(left).argmax(axis=0), np.arange(left.shape[1])])  # the sign of a direction is free
        theta[:, 1 : 1 + count] = (left * signs)[:, :count] * strength[:count] / np.sqrt(answers.shape[1])
    return theta


def _logit(share: Vector) -> Vector:
    share = np.clip(share, 0.02, 0.98)
    return np.asarray(np.log(share / (1 - share)), dtype=np.float64)


def mixture(items: ItemResponses, places: NDArray[np.int64], answers: Vector) -> tuple[Vector, Matrix]:
    """Fit the mixture of a merge to its answers; return it, shape (models,), and its covariance.

    The prior is normal around the uniform mixture. The covariance is the inverse of the information: Σ p(1−p) x xᵀ over
    the answers, with x_i = Θ a_i, plus the prior's.

    Args:
        items: fitted.
        places: shape (n,): which items were answered.
        answers: shape (n,), from 0 to 1.
    """
    x = items.slopes[places] @ items.abilities.T
    b = items.difficulties[places]
    centre = np.full(len(items.abilities), 1 / len(items.abilities))
    weights = centre.copy()
    for _ in range(50):  # Newton: the posterior is log-concave
        p = expit(x @ weights - b)
        gradient = x.T @ (p - answers) + (weights - centre) / _MIXTURE**2
        information = (x * (p * (1 - p))[:, None]).T @ x + np.eye(len(centre)) / _MIXTURE**2
        step = np.linalg.solve(information, gradient)
        weights = weights - step / max(1.0, float(np.abs(step).max()))
        if np.abs(step).max() < 1e-10:
            break
    return weights, np.linalg.inv(information)
