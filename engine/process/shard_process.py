"""The shard's process: one engine, one loop, no other Python thread.

While there is work, the loop checks the pipe between steps; without work, it waits for the pipe. It never waits for the
front to read: `Port` keeps unsent bytes.
"""

from __future__ import annotations

import logging
import os

import msgspec

from engine.adapters.tiers import HostRegion
from engine.errors import EngineDead, LoraxError
from engine.platform import host_tier_bytes, set_threads
from engine.process import child
from engine.process.collector import freeze_gc
from engine.process.parts import load
from engine.process.pipe import Port
from engine.process.pipe_messages import (
    Failed,
    Preload,
    Preloaded,
    Setup,
    ShardReady,
    ToEngine,
    ToShard,
    Updates,
)
from engine.process.stepper import Stepper

FLUSH_S = 1.0  # for the last messages

logger = logging.getLogger(__name__)


def main(socket_fd: int, region_fd: int) -> int:
    """Runs until the front ends the pipe or too many steps fail; returns the exit code."""
    end, setup = child.connect("shard", socket_fd)
    try:
        set_threads(setup.config)
        os.ftruncate(region_fd, host_tier_bytes(setup.config))
        region = HostRegion.attach(region_fd)
        stepper = Stepper(load(setup.parts.engine)(setup.config, region))
    except Exception as error:
        return child.report_failure(end, "shard", error)
    freeze_gc()
    port: Port[Setup | Preload | ToEngine] = Port(end, ToShard)
    try:
        engine = stepper.engine
        port.send(ShardReady(engine.info, msgspec.msgpack.encode(engine.layout), engine.stats))
        serve(port, stepper)
        engine.close()
        return 0
    except EngineDead as error:
        logger.critical("the shard ends: %s", error)
        return error.exit_code
    except Exception:
        logger.critical("the shard ends", exc_info=True)
        return 1
    finally:
        port.close(FLUSH_S)


def serve(port: Port[Setup | Preload | ToEngine], stepper: Stepper) -> None:
    """Receives messages, steps and sends updates, until the front ends the pipe."""
    while not port.ended:
        messages = port.receive(stepper.wait_s)
        orders: list[ToEngine] = []
        for message in messages:
            if isinstance(message, Preload):
                port.send(_preload(message, stepper))
            elif not isinstance(message, Setup):
                orders.append(message)
        updates = stepper.turn(orders)
        stats = stepper.report()
        if updates or stats is not None:
            port.send(Updates(updates, stats))


def _preload(message: Preload, stepper: Stepper) -> Preloaded | Failed:
    try:
        for image in message.images:
            stepper.engine.preload(image)
    except LoraxError as error:
        return Failed(error.to_wire())
    return Preloaded()
