"""Tells in which statements the server may bind the values: those whose whole text Django's own
classes have made, as Django has them.

A parameter that has its literal's type means the same wherever an expression may stand. It does not
where PostgreSQL wants a literal (`INTERVAL '%s days'`, `numeric(10, %s)`, `ORDER BY 1`), and what a
text of the user's has there nobody can tell: RawSQL, extra(), templates, classes and methods that
are not Django's. So it is an allow-list, of classes whose SQL was read. That the text itself, taken
apart, has placeholders only where an expression stands is the second guard.

Names of Django (5.2 to 6.1) used beyond the documented API, and why:

- The classes of nodes in `django.db.models` in `_KNOWN`; `Func.extra`, `.template`, `.function`,
  `.arg_joiner`, `CombinedExpression.connector`: where the user's text goes.
- `Field.select_format`, `.get_placeholder`, `.get_placeholder_sql`: SQL of a field's own.
"""

from __future__ import annotations

import re
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.postgresql.base import DatabaseWrapper
from django.db.models import Field, aggregates, expressions, functions, lookups, query_utils
from django.db.models.fields import related_lookups, tuple_lookups
from django.db.models.sql import compiler
from django.db.models.sql.datastructures import BaseTable, Join
from django.db.models.sql.query import Query
from django.db.models.sql.where import WhereNode

from .session_state import plain

_NAMES: dict[Any, str] = {
    expressions: (
        "Case Col ColPairs CombinedExpression DurationExpression Exists ExpressionWrapper"
        " NegatedExpression OrderBy OrderByList Ref Star Subquery TemporalSubtraction Value When"
        " Window"
    ),
    aggregates: (
        "Aggregate AggregateFilter Avg Count Max Min StdDev StringAggDelimiter Sum Variance"
    ),
    functions: (
        "Abs ACos ASin ATan ATan2 Cast Ceil Chr Coalesce Concat ConcatPair Cos Cot CumeDist Degrees"
        " DenseRank Exp Extract ExtractDay ExtractHour ExtractIsoWeekDay ExtractIsoYear"
        " ExtractMinute ExtractMonth ExtractQuarter ExtractSecond ExtractWeek ExtractWeekDay"
        " ExtractYear FirstValue Floor Greatest Lag LastValue Lead Least Left Length Ln Log Lower"
        " LPad LTrim MD5 Mod Now NthValue Ntile NullIf Ord PercentRank Pi Power Radians Random Rank"
        " Repeat Replace Reverse Right Round RowNumber RPad RTrim SHA1 SHA224 SHA256 SHA384 SHA512"
        " Sign Sin Sqrt StrIndex Substr Tan Trim Trunc TruncDate TruncDay TruncHour TruncMinute"
        " TruncMonth TruncQuarter TruncSecond TruncTime TruncWeek TruncYear Upper"
    ),
    lookups: (
        "Contains EndsWith Exact GreaterThan GreaterThanOrEqual IContains IEndsWith IExact In"
        " IntegerFieldExact IntegerGreaterThan IntegerGreaterThanOrEqual IntegerLessThan"
        " IntegerLessThanOrEqual IRegex IsNull IStartsWith LessThan LessThanOrEqual Range Regex"
        " StartsWith YearExact YearGt YearGte YearLt YearLte"
    ),
    related_lookups: (
        "RelatedExact RelatedGreaterThan RelatedGreaterThanOrEqual RelatedIn RelatedIsNull"
        " RelatedLessThan RelatedLessThanOrEqual"
    ),
    compiler: "PositionRef",
    query_utils: "FilteredRelation",
    tuple_lookups: (
        "Tuple TupleExact TupleGreaterThan TupleGreaterThanOrEqual TupleIn TupleIsNull"
        " TupleLessThan TupleLessThanOrEqual"
    ),
}
# Of django.contrib.postgres, which is imported only where it is used.
_AGGREGATES = {"ArrayAgg", "BitAnd", "BitOr", "BoolAnd", "BoolOr", "JSONBAgg"}
_MAKERS = (
    "as_sql", "as_postgresql", "process_lhs", "process_rhs", "get_rhs_op", "get_db_prep_lookup",
    "template", "function", "arg_joiner",
)  # fmt: skip


def _makers(cls: type) -> tuple[Any, ...]:
    """What a class makes its SQL with."""
    return tuple([getattr(cls, name, None) for name in _MAKERS])


# With what each has at first: somebody may change it, as_postgresql() is even documented for that.
_KNOWN = {cls: _makers(cls) for cls in (BaseTable, Join, Query, WhereNode)} | {
    cls: _makers(cls)
    for module, names in _NAMES.items()
    for name in names.split()
    if (cls := getattr(module, name, None)) is not None  # some are new in Django 6
}
_TEMPLATES = {"template", "function", "arg_joiner"}  # on an instance they are the user's
_CONNECTORS = {"+", "-", "*", "/", "^", "%%", "&", "|", "<<", ">>", "#"}


def is_djangos(node: Any) -> bool:
    """Whether the SQL of a node that is compiled, without that of the nodes in it, is Django's."""
    cls = type(node)
    if cls is expressions.RawSQL:  # a many-to-many relation's prefetch selects a column in this way
        return not node.params and _COLUMN.fullmatch(node.sql) is not None
    if cls.__module__ == _CONTRIB and cls.__name__ in _AGGREGATES:
        _KNOWN.setdefault(cls, _makers(cls))
    if _KNOWN.get(cls) != _makers(cls) or not _is_of_django(cls, "as_sql", "as_postgresql"):
        return False
    state = vars(node)
    if state.get("extra") or (not _TEMPLATES.isdisjoint(state) and cls not in _STATISTICS):
        return False
    if cls in _COMBINED and node.connector not in _CONNECTORS:
        return False
    field = getattr(node, "_output_field_or_none", None)
    if field is None or cls is WhereNode:
        return True
    if cls is functions.Cast and not has_djangos_type(field):
        return False
    return _is_of_django(type(field), "select_format") and (
        cls is not expressions.Value or not has_placeholder(field)
    )


_COLUMN = re.compile(r'"\w+"\."\w+"')
_CONTRIB = "django.contrib.postgres.aggregates.general"
_STATISTICS = {aggregates.StdDev, aggregates.Variance}  # they choose their function
_COMBINED = {
    expressions.CombinedExpression,
    expressions.DurationExpression,
    expressions.TemporalSubtraction,
}


def _is_of_django(cls: type, *names: str) -> bool:
    """Whether methods of a class, as far as it has them, are Django's."""
    functions = [getattr(cls, name, None) for name in names]
    return all(f is None or f.__module__.startswith("django.") for f in functions)


def has_djangos_type(field: Any) -> bool:
    """Whether Django says of which type a field's column is."""
    cls = type(field.target_field if field.is_relation else field)
    return _is_of_django(cls, "db_type", "cast_db_type", "db_parameters")


def writes_as_django(wrapper: BaseDatabaseWrapper) -> bool:
    """Whether what a backend puts into SQL is Django's."""
    ops: Any = type(wrapper.ops)
    return (
        all(getattr(wrapper, name) is getattr(DatabaseWrapper, name) for name in _OPERATORS)
        and ops.compiler_module.startswith("django.")
        and all(cls.__module__.startswith("django.") for cls in ops.__mro__[:-1])
    )


_OPERATORS = ("operators", "pattern_esc", "pattern_ops")


def has_placeholder(field: Field[Any, Any]) -> bool:
    """Whether a field writes SQL around its values."""
    return hasattr(field, "get_placeholder") or hasattr(field, "get_placeholder_sql")


# After one of these begins an expression, which a parameter may be.
_BEFORE = {
    "(", ",", "=", "<", ">", "+", "-", "*", "/", "%", "^", "|", "&", "#", "~", "!", "@", "and",
    "or", "not", "select", "distinct", "where", "having", "when", "then", "else", "like", "ilike",
    "between", "in", "is", "from", "for", "offset", "limit",
}  # fmt: skip
_TOKENS = re.compile(r"%s|::|\w+|[^\w\s]")
_ENDS = {"limit", "offset", "having", "for", "range", "rows", "groups", "window"}


def in_place_of_expressions(sql: str) -> bool:
    """Whether each placeholder of a statement stands where PostgreSQL takes any expression."""
    sql = sql.replace("%%", " % ")
    text = plain(sql)
    if text is None or text.count("%s") != sql.count("%s"):  # in a literal, a comment, a name
        return False
    tokens = [*_TOKENS.findall(text), "", ""]
    # For each bracket whether its parameters are none of PostgreSQL's: a type's, a list's to order.
    open_: list[bool] = [False]
    for number, token in enumerate(tokens):
        last = tokens[number - 1]
        if token == "(":
            of_type = tokens[number - 2] in ("::", "as")
            open_.append(open_[-1] or of_type)
        elif token == ")":
            if len(open_) == 1:
                return False
            open_.pop()
        elif token == "by":
            open_[-1] = True
        elif token in _ENDS:
            open_[-1] = len(open_) > 1 and open_[-2]
        elif token == "%s" and (
            open_[-1] or last not in _BEFORE or tokens[number + 1] in ("::", "[")
        ):
            return False
    return True
