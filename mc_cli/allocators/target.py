"""The budget that a target leaves to the routed experts, and widths and bytes of all that stands beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from mc_cli.allocators import Budget, Floor
from mc_cli.allocators.beside import WIDTHS as ROLE_WIDTHS
from mc_cli.allocators.beside import bought_widths
from mc_cli.allocators.trust import hedged
from mc_cli.artifacts.importance import Importance
from mc_cli.encodings import encoding_for, family_of_role, stored_bytes
from mc_cli.errors import PlanError, ShapeError
from mc_cli.parts import BESIDE_TEXT, DROPPED, KEPT_BITS, ModelInventory, Role, TensorPart
from mc_cli.registry import widths_of
from mc_cli.settings import WIDTH_BORDERS, AllocateSettings, QuantizerSettings

# A safetensors header spends about this much per tensor beside its name; counted so that --target-size holds for files.
_HEADER_BYTES_PER_TENSOR = 96
_HEADER_BYTES_PER_FILE = 64


def beside_experts(
    settings: AllocateSettings,
    inventory: ModelInventory,
    quantizer: QuantizerSettings,
    importance: Importance | None = None,
) -> tuple[dict[Role, int], int]:
    """(width of each role that the model has, file bytes of all that is not a routed expert weight).

    For a size in bytes: the widths at which the whole is predicted to lose least, where `importance` holds what they
    cost; else the widest that still leave the experts the mean width beside which they are the right ones.
    Raises PlanError for a width of its own of a tied head.
    """
    role_bits, others = _widths_beside(settings, inventory, quantizer)
    by_cost = settings.target_size_bytes is not None and settings.engine is None and not settings.codes_no_expert
    if importance is not None and by_cost:
        role_bits |= _bought(settings, inventory, quantizer, hedged(importance, settings.hedge), role_bits)
        others = other_bytes(inventory, role_bits, quantizer)
    if settings.vision_bits != KEPT_BITS and not {part.role for part in inventory.tensors} & set(BESIDE_TEXT):
        raise PlanError(
            f"--vision-bits {settings.vision_bits}: {inventory.model_type} has no tower and no projector. Leave it out."
        )
    if inventory.tied_head and settings.head_bits not in (None, role_bits[Role.EMBEDDING]):
        raise PlanError(
            f"--head-bits {settings.head_bits}: this model's head is tied to its embedding, which gets "
            f"{role_bits[Role.EMBEDDING]} bits here. Give --embedding-bits for both."
        )
    there = {part.role for part in inventory.tensors}
    return {role: bits for role, bits in role_bits.items() if role in there}, others


def idle_widths(settings: AllocateSettings, inventory: ModelInventory) -> tuple[str, ...]:
    """A warning for widths that were given for parts which the model has not; empty without any."""
    there = {part.role for part in inventory.tensors}
    follows_shared = settings.dense_bits is None and Role.DENSE in there
    lacking = {
        "--shared-bits": settings.shared_bits is not None and Role.SHARED not in there and not follows_shared,
        "--dense-bits": settings.dense_bits is not None and Role.DENSE not in there,
    }
    what = {"--shared-bits": "shared experts", "--dense-bits": "MLPs of layers without experts"}
    idle = [flag for flag, lacks in lacking.items() if lacks]
    if not idle:
        return ()
    change = "changes" if len(idle) == 1 else "change"
    lacks = " and no ".join(what[flag] for flag in idle)
    return (f"{' and '.join(idle)} {change} nothing: {inventory.model_type} has no {lacks}.",)


def _widths_beside(
    settings: AllocateSettings, inventory: ModelInventory, quantizer: QuantizerSettings
) -> tuple[dict[Role, int], int]:

    def widths(mean_bits: float) -> dict[Role, int]:
        found = settings.role_bits(mean_bits)
        if inventory.tied_head:
            del found[Role.HEAD]  # no matrix of its own
        return found

    alike = settings.has_one_width or settings.codes_no_expert
    asked = settings.width_left if alike else settings.target_stored_bits or settings.target_bits
    if asked is not None:
        role_bits = widths(asked)
        return role_bits, other_bytes(inventory, role_bits, quantizer)
    for border in WIDTH_BORDERS:
        role_bits = widths(math.nextafter(border, math.inf))
        others = other_bytes(inventory, role_bits, quantizer)
        left = (settings.target_size_bytes or 0) - inventory.directory_bytes - others
        if 8 * left > border * inventory.expert_weight_count:
            break
    return role_bits, others


def _bought(
    settings: AllocateSettings,
    inventory: ModelInventory,
    quantizer: QuantizerSettings,
    importance: Importance,
    role_bits: Mapping[Role, int],
) -> dict[Role, int]:
    """The widths of roles that nobody gave and whose costs were measured, by what each byte saves."""
    given = {role for role, bits in settings.given_beside.items() if bits is not None}
    sizes: dict[Role, dict[int, int]] = {}
    for role in importance.role_costs.keys() & role_bits.keys() - given:
        parts = [part for part in inventory.tensors if part.role is role and part.packable]
        family = family_of_role(role, quantizer.family)
        known = [bits for bits in ROLE_WIDTHS if bits in widths_of(family)]
        if parts and known:
            sizes[role] = {bits: sum(_part_bytes(part, bits, quantizer) for part in parts) for bits in known}
    widths = [bits for bits in settings.bits or importance.candidate_bits if bits != DROPPED]
    measured = [
        set(part.predicted_loss_by_bits) for layer in importance.layers for part in layer.projections or (layer,)
    ]
    if not sizes or not all(known >= set(widths) for known in measured):  # the strategy tells what it lacks
        return {}
    # Kept parts of these roles, biases say, are counted with everything else.
    rest = other_bytes(inventory, {**role_bits, **{role: min(by) for role, by in sizes.items()}}, quantizer)
    rest -= sum(min(by.values()) for by in sizes.values())
    assert settings.target_size_bytes is not None
    room = settings.target_size_bytes - inventory.directory_bytes - rest
    return bought_widths(importance, sizes, room=room, widths=widths)


def floors_of(settings: AllocateSettings) -> list[Floor] | None:
    """The floors asked for; None = the method's own."""
    return None if settings.floors is None else [Floor(bits, count) for bits, count in settings.floors]


def budget_of(settings: AllocateSettings, inventory: ModelInventory, others: int) -> Budget:
    """The budget of the routed experts, beside `others` bytes of all other tensors.

    A size is that of a whole directory: what lies in it beside the tensors is taken off, as far as that is known.
    """
    if settings.target_stored_bits is not None:
        return Budget("stored_bits", settings.target_stored_bits)
    if settings.target_bits is not None:
        return Budget("code_bits", settings.target_bits)
    assert settings.target_size_bytes is not None
    taken = others + inventory.directory_bytes
    return Budget("expert_bytes", settings.target_size_bytes - taken, other_bytes=taken)


def other_bytes(inventory: ModelInventory, role_bits: Mapping[Role, float], quantizer: QuantizerSettings) -> int:
    """File bytes of all that is not a routed expert weight, at the roles' widths, headers included (rounded up)."""
    total = 0
    names = 0
    for part in inventory.tensors:
        names += len(part.name) + 3 * _HEADER_BYTES_PER_TENSOR
        if part.role is not Role.EXPERT:
            total += _part_bytes(part, role_bits.get(part.role, KEPT_BITS), quantizer)
    # Every width of every projection may occur in a layer: three stacked tensors each.
    stacked = sum(
        len(block.projections) * 5 * 3 * (len(block.path) + 2 * _HEADER_BYTES_PER_TENSOR)
        for block in inventory.expert_blocks
    )
    return total + names + stacked + (inventory.num_layers + 1) * _HEADER_BYTES_PER_FILE


def _part_bytes(part: TensorPart, bits: float, quantizer: QuantizerSettings) -> int:
    if bits == KEPT_BITS or not part.packable:
        return part.size_bytes
    family, limit = family_of_role(part.role, quantizer.family), quantizer.group_size
    try:
        return stored_bytes(encoding_for(family, bits, *part.shape, group_size_limit=limit), *part.shape)
    except ShapeError as error:
        raise ShapeError(f"{part.name}: {error}. Keep it with --{part.role.value}-bits 16.") from error
