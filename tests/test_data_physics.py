"""Physical systems against exact solutions, first integrals by autograd, and a second solver tolerance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from scipy.special import ellipj, ellipk
from torch import Tensor

from dynablocks.data.physics import flow_pairs, generate, integrate
from dynablocks.data.systems import (
    SYSTEMS,
    HamiltonianSystem,
    Kepler,
    LotkaVolterra,
    MassSpring,
    PhysicalSystem,
    RigidBody,
    require_system,
)
from dynablocks.errors import InvalidArgument

EPS = torch.finfo(torch.float64).eps


def _doubles(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


NAMES = sorted(SYSTEMS)
SHORT = {"robertson": 0.5}
CONSTANTS: dict[str, dict[str, float]] = {
    "pendulum": {"frequency": 1.7},
    "kepler": {"strength": 2.0},
    "henon-heiles": {"coupling": 0.6},
    "mass-spring": {"mass": 2.5, "stiffness": 0.7},
    "double-pendulum": {"mass_1": 1.2, "mass_2": 0.7, "length_1": 1.3, "length_2": 0.8, "gravity": 9.81},
    "lotka-volterra": {"birth": 2.0, "predation": 3.0, "growth": 5.0, "death": 7.0},
}
"""None is 1, so that a constant cannot be left out of a formula, nor be squared, unseen."""


def _states(system: PhysicalSystem, count: int = 6, seed: int = 3) -> Tensor:
    return system.draw(count, torch.Generator().manual_seed(seed))


def _jacobians(system: PhysicalSystem, x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.jacrev(lambda row: system.vector_field(row[None])[0]))(x)


def _derivative_along(system: PhysicalSystem, invariant: str, x: Tensor) -> Tensor:
    """|∇I·X| relative to ‖∇I‖‖X‖, row by row."""
    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad(system.invariants[invariant](x).sum(), x)
    field = system.vector_field(x)
    return ((gradient * field).sum(dim=1).abs() / (gradient.norm(dim=1) * field.norm(dim=1))).detach()


@pytest.mark.parametrize("name", NAMES)
def test_a_system_is_complete_and_its_words_agree(name: str) -> None:
    system = SYSTEMS[name]()
    assert system.name == name
    x = _states(system)
    assert x.shape == (6, system.dimension) == (6, len(set(system.state_names)))
    assert x.dtype == system.vector_field(x).dtype == torch.float64
    assert system.vector_field(x).shape == x.shape
    assert set(system.preserves) <= {"energy", "mass", "norm", "volume", "symplectic", "positive"}
    assert {"energy", "mass", "norm"} & set(system.preserves) <= set(system.invariants)
    assert ("symplectic" in system.preserves) == isinstance(system, HamiltonianSystem)
    assert torch.equal(x, _states(system))
    assert not torch.equal(x, _states(system, seed=4))
    assert system.__doc__
    assert "Initial states:" in system.__doc__


@pytest.mark.parametrize(("name", "invariant"), [(n, i) for n in NAMES for i in SYSTEMS[n]().invariants])
def test_an_invariant_has_no_derivative_along_the_field(name: str, invariant: str) -> None:
    for system in (SYSTEMS[name](), SYSTEMS[name](**CONSTANTS.get(name, {}))):
        assert float(_derivative_along(system, invariant, _states(system)).max()) < 64 * EPS


def test_a_wrong_field_moves_its_invariant() -> None:
    class Leaking(LotkaVolterra):
        def vector_field(self, x: Tensor) -> Tensor:
            return super().vector_field(x) - 1e-6 * x

    assert float(_derivative_along(Leaking(), "energy", _states(Leaking())).max()) > 1e-8


@pytest.mark.parametrize("name", [n for n in NAMES if issubclass(SYSTEMS[n], HamiltonianSystem)])
def test_a_hamiltonian_field_is_the_rotated_gradient(name: str) -> None:
    system = SYSTEMS[name](**CONSTANTS[name])
    assert isinstance(system, HamiltonianSystem)
    x = _states(system).requires_grad_()
    (gradient,) = torch.autograd.grad(system.hamiltonian(x).sum(), x)
    half = system.dimension // 2
    expected = torch.cat([gradient[:, half:], -gradient[:, :half]], dim=1)
    torch.testing.assert_close(system.vector_field(x), expected, rtol=0, atol=1e3 * EPS)


@pytest.mark.parametrize(
    ("name", "constants", "state", "slope"),
    [
        ("pendulum", (2.0,), (math.pi / 6, 0.5), (0.5, -2.0)),
        ("kepler", (2.0,), (3.0, 4.0, 0.5, 0.25), (0.5, 0.25, -0.048, -0.064)),
        ("henon-heiles", (0.5,), (0.5, 0.25, 1.0, 2.0), (1.0, 2.0, -0.625, -0.34375)),
        ("mass-spring", (2.0, 3.0), (0.5, 0.25), (0.125, -1.5)),
        ("rigid-body", (2.0, 1.0, 0.5), (0.5, 0.25, 1.0), (0.25, -0.75, 0.0625)),
        ("sir", (2.0, 3.0), (0.5, 0.25, 0.25), (-0.25, -0.5, 0.75)),
        ("seir", (2.0, 3.0, 5.0), (0.5, 0.125, 0.25, 0.125), (-0.25, -0.125, -0.875, 1.25)),
        ("robertson", (2.0, 3.0, 5.0), (0.5, 0.25, 0.25), (-0.6875, 0.5, 0.1875)),
        ("lotka-volterra", (2.0, 3.0, 5.0, 7.0), (0.5, 0.25), (0.625, -1.125)),
        (
            "abc-flow",
            (2.0, 3.0, 5.0),
            (1.0, 2.0, 3.0),
            (
                2 * math.sin(3) + 5 * math.cos(2),
                3 * math.sin(1) + 2 * math.cos(3),
                5 * math.sin(2) + 3 * math.cos(1),
            ),
        ),
    ],
)
def test_a_field_is_its_formula_at_a_point(
    name: str, constants: tuple[float, ...], state: tuple[float, ...], slope: tuple[float, ...]
) -> None:
    """Worked out by hand from the formulas: what an energy, a mass or a divergence cannot tell apart differs here."""
    torch.testing.assert_close(
        SYSTEMS[name](*constants).vector_field(_doubles(state)), _doubles(slope), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("name", [n for n in NAMES if issubclass(SYSTEMS[n], HamiltonianSystem)])
def test_an_energy_is_separable_where_its_mixed_derivatives_vanish(name: str) -> None:
    system = SYSTEMS[name]()
    assert isinstance(system, HamiltonianSystem)
    half = system.dimension // 2
    hessians = torch.func.vmap(torch.func.hessian(lambda row: system.hamiltonian(row[None])[0]))(_states(system))
    mixed = float(hessians[:, :half, half:].abs().max())
    assert mixed == 0 if system.separable else mixed > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_the_divergence_is_zero_exactly_where_volume_is_claimed(name: str) -> None:
    system = SYSTEMS[name]()
    divergence = _jacobians(system, _states(system)).diagonal(dim1=1, dim2=2).sum(dim=1).abs()
    assert float(divergence.max()) < 64 * EPS if "volume" in system.preserves else float(divergence.max()) > 1e-3


@pytest.mark.parametrize("name", [n for n in NAMES if "positive" in SYSTEMS[n].preserves])
def test_the_boundary_of_the_positive_cone_is_not_crossed(name: str) -> None:
    system = SYSTEMS[name]()
    for k in range(system.dimension):
        x = _states(system)
        x[:, k] = 0
        assert float(system.vector_field(x)[:, k].min()) >= 0


@pytest.mark.parametrize("name", [n for n in NAMES if "mass" in SYSTEMS[n].preserves])
def test_compartments_start_on_the_simplex(name: str) -> None:
    x = _states(SYSTEMS[name](), count=500)
    assert float(x.min()) >= 0
    assert float((x.sum(dim=1) - 1).abs().max()) <= 4 * EPS


def test_the_simplex_is_drawn_uniformly() -> None:
    x = _states(SYSTEMS["sir"](), count=4000)
    assert float((x.mean(dim=0) - 1 / 3).abs().max()) < 4 * math.sqrt(1 / 18 / 4000)
    assert float((x.var(dim=0) - 1 / 18).abs().max()) < 0.005


@pytest.mark.parametrize(
    ("name", "box"),
    [
        ("pendulum", [(-math.pi / 2, math.pi / 2), (-1, 1)]),
        ("double-pendulum", [(-1, 1), (-1, 1), (-0.5, 0.5), (-0.5, 0.5)]),
        ("henon-heiles", [(-0.25, 0.25)] * 4),
        ("mass-spring", [(-1, 1)] * 2),
        ("robertson", [(0.5, 1 - 1e-4), (0, 1e-4)]),
        ("lotka-volterra", [(0.5, 2)] * 2),
        ("abc-flow", [(0, 2 * math.pi)] * 3),
    ],
)
def test_states_are_drawn_uniformly_from_the_box_that_is_documented(name: str, box: list[tuple[float, float]]) -> None:
    """Mean and variance of 4000 uniform numbers, within four standard deviations and more."""
    low, high = _doubles(*box).T
    share = (_states(SYSTEMS[name](), count=4000)[:, : len(box)] - low) / (high - low)
    assert 0 <= float(share.min()) <= float(share.max()) <= 1
    torch.testing.assert_close(share.mean(dim=0), torch.full_like(low, 1 / 2), rtol=0, atol=0.019)
    torch.testing.assert_close(share.var(dim=0), torch.full_like(low, 1 / 12), rtol=0, atol=0.005)


def test_bodies_are_drawn_uniformly_from_the_sphere() -> None:
    x = _states(RigidBody(), count=4000)
    torch.testing.assert_close(x.mean(dim=0), _doubles(0.0, 0.0, 0.0), rtol=0, atol=4 * math.sqrt(1 / 3 / 4000))
    moments = x.mT @ x / len(x)
    torch.testing.assert_close(moments, torch.eye(3).double() / 3, rtol=0, atol=4 * math.sqrt(4 / 45 / 4000))


def test_kepler_orbits_have_the_promised_size_and_bodies_start_on_the_sphere() -> None:
    kepler = Kepler(strength=2.0)
    torch.testing.assert_close(kepler.hamiltonian(_states(kepler)), torch.full((6,), -1.0).double(), rtol=0, atol=1e-12)
    assert float((_states(RigidBody()).norm(dim=1) - 1).abs().max()) < 4 * EPS


@pytest.mark.parametrize("name", NAMES)
def test_halving_the_tolerances_changes_nothing_and_invariants_stay(name: str) -> None:
    system = SYSTEMS[name]()
    x0, times = _states(system, count=3), torch.linspace(0, SHORT.get(name, 4.0), 3, dtype=torch.float64)
    states = integrate(system, x0, times)
    finer = integrate(system, x0, times, rtol=5e-14, atol=5e-15)
    assert torch.equal(states[:, 0], x0)
    assert float((states - finer).abs().max()) < 1e-10
    for invariant in system.invariants.values():
        assert float((invariant(states[:, -1]) - invariant(x0)).abs().max()) < 1e-10
    if "positive" in system.preserves:
        assert float(states.min()) >= 0


def test_a_loose_tolerance_is_seen_by_the_energy_drift() -> None:
    system = require_system("kepler")
    x0 = _states(system)
    states = integrate(system, x0, _doubles(0.0, 20.0), rtol=1e-4, atol=1e-4)[:, -1]
    assert float((system.invariants["energy"](states) - system.invariants["energy"](x0)).abs().max()) > 1e-6


def test_the_mass_spring_swings_as_cosine_and_sine() -> None:
    mass, stiffness = 2.0, 3.0
    times = torch.linspace(0, 10, 8, dtype=torch.float64)
    x0 = _doubles([1.0, 0.0], [0.0, 1.0], [-0.3, 0.8])
    omega = math.sqrt(stiffness / mass)
    cosine, sine = (omega * times).cos(), (omega * times).sin()
    q, p = x0[:, :1], x0[:, 1:]
    expected = torch.stack([q * cosine + p / (mass * omega) * sine, p * cosine - mass * omega * q * sine], dim=2)
    torch.testing.assert_close(integrate(MassSpring(mass, stiffness), x0, times), expected, rtol=0, atol=1e-11)


def test_the_pendulum_has_its_elliptic_period_and_solution() -> None:
    amplitude = 2.5
    m = math.sin(amplitude / 2) ** 2
    period = 4 * float(ellipk(m))
    times = _doubles(0.0, period / 4, period / 2, period)
    states = integrate("pendulum", _doubles([amplitude, 0.0]), times)[0]
    assert abs(float(states[1, 0])) < 1e-11
    torch.testing.assert_close(states[2], -states[0], rtol=0, atol=1e-11)
    torch.testing.assert_close(states[3], states[0], rtol=0, atol=1e-11)
    sine, _, _, _ = ellipj(float(ellipk(m)) - 1.3, m)
    swung = integrate("pendulum", _doubles([amplitude, 0.0]), _doubles(0.0, 1.3))
    assert abs(float(swung[0, 1, 0]) - 2 * math.asin(math.sqrt(m) * sine)) < 1e-11


def test_a_circular_kepler_orbit_is_a_circle() -> None:
    times = torch.linspace(0, 2 * math.pi, 9, dtype=torch.float64)
    states = integrate("kepler", _doubles([1.0, 0.0, 0.0, 1.0]), times)[0]
    expected = torch.stack([times.cos(), times.sin(), -times.sin(), times.cos()], dim=1)
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-11)


def test_a_rigid_body_turns_about_its_symmetry_axis() -> None:
    body = RigidBody(2.0, 2.0, 1.0)
    rate = 1 / body.inertia_3 - 1 / body.inertia_1
    x0 = _doubles([0.6, 0.0, 0.8])
    t = _doubles(0.0, 3.0)
    angle = rate * 0.8 * t[1]
    expected = _doubles(0.6 * math.cos(angle), -0.6 * math.sin(angle), 0.8)
    torch.testing.assert_close(integrate(body, x0, t)[0, 1], expected, rtol=0, atol=1e-12)


def test_the_sir_final_size_relation_holds() -> None:
    """ln(S₀/S) = (β/γ)(R − R₀) along every solution."""
    x0, x1 = flow_pairs("sir", 20, 1.0)
    torch.testing.assert_close((x0[:, 0] / x1[:, 0]).log(), x1[:, 2] - x0[:, 2], rtol=0, atol=1e-12)


def test_robertson_reaches_the_published_state_at_40() -> None:
    """Reference value at t = 40 of the LSODE and CVODE examples, printed to five digits."""
    x0 = _doubles([1.0, 0.0, 0.0])
    state = integrate("robertson", x0, _doubles(0.0, 40.0), rtol=1e-10, atol=1e-12)[0, 1]
    expected = _doubles(7.158e-1, 9.185e-6, 2.842e-1)
    torch.testing.assert_close(state, expected, rtol=2e-4, atol=0)


def test_backwards_undoes_forwards_and_rows_may_have_their_own_times() -> None:
    system = require_system("pendulum")
    x0 = _states(system, count=2)
    times = _doubles([0.0, 1.0, 0.0], [0.0, -2.0, 0.5])
    states = integrate(system, x0, times)
    torch.testing.assert_close(states[0, 2], x0[0], rtol=0, atol=1e-12)
    alone = integrate(system, x0[1:], _doubles(0.0, 0.5))
    torch.testing.assert_close(states[1, 2], alone[0, 1], rtol=0, atol=1e-12)


def test_chunks_do_not_matter() -> None:
    x0, x1 = flow_pairs("mass-spring", 130, 1.0)
    expected = torch.stack(
        [
            x0[:, 0] * math.cos(1) + x0[:, 1] * math.sin(1),
            x0[:, 1] * math.cos(1) - x0[:, 0] * math.sin(1),
        ],
        dim=1,
    )
    torch.testing.assert_close(x1, expected, rtol=0, atol=1e-12)


def test_data_depend_on_the_seed_and_on_nothing_else() -> None:
    first = generate("sir", 3, 4, 0.25, noise=0.1, irregular=0.5, seed=7)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = generate("sir", 3, 4, 0.25, noise=0.1, irregular=0.5, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(first.times + first.states, again.times + again.states, strict=True):
        assert torch.equal(a, b)
    other = generate("sir", 3, 4, 0.25, noise=0.1, irregular=0.5, seed=8)
    assert not torch.equal(first.states[0], other.states[0])
    assert torch.equal(
        flow_pairs("sir", 3, 1.0, seed=7)[0], torch.stack([s[0] for s in generate("sir", 3, 1, seed=7).states])
    )


def test_noise_and_irregular_sampling_are_what_they_say() -> None:
    clean = generate("pendulum", 40, 20, 0.1, seed=1)
    noisy = generate("pendulum", 40, 20, 0.1, noise=0.01, seed=1)
    error = torch.cat(noisy.states) - torch.cat(clean.states)
    assert abs(float(error.std()) - 0.01) < 4 * 0.01 / math.sqrt(2 * error.numel())
    jittered = generate("pendulum", 40, 20, 0.1, irregular=0.9, seed=1)
    shift = torch.stack(jittered.times) - torch.stack(clean.times)
    assert 0.04 < float(shift.abs().max()) <= 0.045
    assert not shift[:, [0, -1]].any()
    assert not torch.equal(jittered.times[0], jittered.times[1])
    x0 = torch.stack([states[0] for states in jittered.states])
    assert torch.equal(x0, torch.stack([states[0] for states in clean.states]))
    alone = integrate("pendulum", x0[:1], jittered.times[0])[0]
    torch.testing.assert_close(jittered.states[0], alone, rtol=0, atol=1e-12)


def test_times_move_by_a_share_of_their_shorter_interval() -> None:
    times = _doubles(0.0, 1.0, 1.1, 3.0)
    data = generate("mass-spring", 200, times=times, irregular=0.9, seed=1)
    shift = torch.stack(data.times) - times
    assert not shift[:, [0, -1]].any()
    largest = shift[:, 1:-1].abs().amax(dim=0)
    # Half of 0.9 of the middle interval, which is the shorter neighbour of both.
    assert 0.04 < float(largest.min()) <= float(largest.max()) <= 0.045 + 4 * EPS


def test_given_times_are_used() -> None:
    times = _doubles(0.0, 0.1, 1.0, 1.5)
    data = generate("mass-spring", 2, times=times, irregular=0.0)
    assert torch.equal(data.times[1], times)
    assert data.states[1].shape == (4, 2)


@dataclass(frozen=True)
class _Explosion(PhysicalSystem):
    """x' = x²; Initial states: 1."""

    name = "explosion"
    state_names = ("x",)
    preserves = ()

    def vector_field(self, x: Tensor) -> Tensor:
        return x.square()


ONE = _doubles([1.0])
BATCH = torch.full((2, 3), 0.2, dtype=torch.float64)
FORTH = _doubles(0.0, 1.5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: generate("pendulm"), "did you mean 'pendulum'"),
        (lambda: generate(3), "a name of SYSTEMS"),
        (lambda: generate("sir", 0), "trajectories is 0"),
        (lambda: generate("sir", steps=0), "steps is 0"),
        (lambda: generate("sir", step_size=0.0), "step_size is 0.0"),
        (lambda: generate("sir", noise=-1.0), "noise is -1.0"),
        (lambda: generate("sir", noise=math.nan), "noise is nan"),
        (lambda: generate("sir", irregular=1.0), "irregular is 1.0"),
        (lambda: generate("sir", times=_doubles(0.0, 1.0, 1.0)), "strictly increasing"),
        (lambda: flow_pairs("sir", 0, 1.0), "count is 0"),
        (lambda: flow_pairs("sir", 2, math.inf), "horizon is inf"),
        (lambda: SYSTEMS["sir"](infection=-1.0), "infection of sir is -1.0"),
        (lambda: SYSTEMS["kepler"](math.nan), "strength of kepler is nan"),
        (lambda: integrate("sir", _doubles(*[[1.0] * 4] * 2), FORTH), r"shape \(2, 4\).*\(batch, 3\)"),
        (lambda: integrate("sir", BATCH * math.nan, FORTH), "x0 has a value"),
        (lambda: integrate("sir", BATCH, _doubles([0.0, 1.0])), r"times has the shape \(1, 2\)"),
        (lambda: integrate("sir", BATCH, FORTH / 0), "times has a value"),
        (lambda: integrate("sir", BATCH, FORTH, rtol=1e-15), "rtol is 1e-15"),
        (lambda: integrate("sir", BATCH, FORTH, atol=0.0), "atol is 0.0"),
        (lambda: integrate("sir", BATCH.float(), FORTH), "x0 is torch.float32"),
        (lambda: integrate("sir", BATCH, FORTH.float()), "times is torch.float32"),
        (lambda: integrate(_Explosion(), ONE, FORTH), "cannot follow explosion beyond about t = 0 "),
        (lambda: integrate("kepler", _doubles([0.0] * 4), FORTH), "cannot follow kepler"),
    ],
)
def test_bad_arguments_get_a_sentence(call: object, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        call()  # type: ignore[operator]
