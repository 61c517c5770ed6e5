"""Numbers on the command line, in plain digits. click alone reads them as Python does: "1_0", "nan" and " 5" pass."""

from typing import Any

import click

from shoal.config.option import read_number
from shoal.values import decimal_number, whole_number


class Integer(click.types.IntParamType):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and whole_number(value) is None:
            self.fail(f"{value!r} is not a valid integer.", param, ctx)
        return super().convert(value, param, ctx)


class DecimalFloat(click.types.FloatParamType):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and decimal_number(value) is None:
            self.fail(f"{value!r} is not a valid float.", param, ctx)
        return super().convert(value, param, ctx)


class AnyNumber(DecimalFloat):
    """A number that may be NaN or infinite; the option's own check refuses those with a better message."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(read_number(value, float) if isinstance(value, str) else value, param, ctx)


class IntRange(Integer, click.IntRange):
    pass


class FloatRange(DecimalFloat, click.FloatRange):
    pass


class AnyFloatRange(AnyNumber, click.FloatRange):
    pass
