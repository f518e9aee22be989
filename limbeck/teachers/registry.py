"""The registry of teachers, by location."""

from __future__ import annotations

from limbeck.registry import Registry
from limbeck.teachers.base import TeacherLocation
from limbeck.teachers.in_process import InProcess
from limbeck.teachers.none import Nowhere

_MEMBERS: dict[str, type[TeacherLocation]] = {"in_process": InProcess, "none": Nowhere}
TEACHERS = Registry("teacher", _MEMBERS, entry_points="limbeck.teachers")
