"""The registry of teachers, by location."""

from __future__ import annotations

from limbeck.registry import Registry
from limbeck.teachers.base import TeacherLocation
from limbeck.teachers.hosted_options import OnApi
from limbeck.teachers.in_process import InProcess
from limbeck.teachers.none import Nowhere
from limbeck.teachers.placed import Placed
from limbeck.teachers.served_options import OnServer
from limbeck.teachers.sharded import Sharded
from limbeck.teachers.store.teacher import InStore

_MEMBERS: dict[str, type[TeacherLocation]] = {
    "in_process": InProcess,
    "placed": Placed,
    "sharded": Sharded,
    "server": OnServer,
    "store": InStore,
    "api": OnApi,
    "none": Nowhere,
}
TEACHERS = Registry("teacher", _MEMBERS, entry_points="limbeck.teachers")
