"""Packet devices: where the ESP of this process takes inner packets from, and delivers them to."""

from natcompat.esp.device.queue import CallbackDevice, QueueDevice
from natcompat.ipsec.device import PacketDevice, SaDevice

__all__ = ["CallbackDevice", "PacketDevice", "QueueDevice", "SaDevice"]
