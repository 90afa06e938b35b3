"""Which statements may go with others' on one connection, as far as their texts tell."""

from __future__ import annotations

import re

from ..session_state import OF_NO_NAME, leaves_state, makes_a_table, plain, remembered

# All of these look at what `plain()` returns.
_READS = re.compile(r"[\s(]*+(?:select|values|table)\b")
_COMMANDS = re.compile(r"[\s(]*+(?:select|values|table|with|insert|update|delete|merge)\b")
# What makes something, or may wait for another transaction, or for time: nothing is put behind it.
_WAITS = re.compile(
    r"\bfor\s+(?:no\s+key\s+)?update\b|\bfor\s+(?:key\s+)?share\b|\bpg_sleep|(?:\b|_)lock"
    r"|\binto\b"
)
_WAITING = ("update", "share", "pg_sleep", "lock", "into")  # one is in what that matches
_INTO = re.compile(rf"\binto\s++(?:[^{OF_NO_NAME}]|[\".])++\s*+\(")  # columns follow
_CALL = re.compile(rf"\"\s*+\(|(?<![^{OF_NO_NAME}])([^{OF_NO_NAME}]++)\s*+\(")
_PLACEHOLDER = re.compile(r"%(?:\(\w++\))?s")
_OPERATOR = re.compile(r"[-+*/<>=~!@#%^&|`?]++")
# What may stand before a parenthesis: functions of PostgreSQL and of extensions that Django knows
# which leave the session alone, types, and words that are no functions.
_HARMLESS = frozenset(
    """
    all and any array as asc between by case cast conflict cube desc distinct else end escape except
    exists filter from group having ilike in intersect interval into is join lateral like limit
    materialized not offset on only or order over returning rollup row select set sets
    similar some then to union using values when where window with zone
    bigint bit bool boolean bpchar bytea char character date decimal double float float4 float8
    inet int int4 int8 integer json jsonb numeric precision real regclass smallint text time
    timestamp timestamptz timetz uuid varbit varchar varying
    any_value array_agg avg bit_and bit_or bit_xor bool_and bool_or corr count covar_pop covar_samp
    cume_dist dense_rank every first_value grouping json_agg json_object_agg jsonb_agg
    jsonb_object_agg lag last_value lead max min mode nth_value ntile percent_rank percentile_cont
    percentile_disc range_agg rank regr_avgx regr_avgy regr_count regr_intercept regr_r2 regr_slope
    regr_sxx regr_sxy regr_syy row_number stddev stddev_pop stddev_samp string_agg sum var_pop
    var_samp variance
    abs acos asin atan atan2 cbrt ceil ceiling cos cot degrees div exp factorial floor gcd lcm ln
    log log10 mod pi power radians random round sign sin sqrt tan trunc width_bucket
    ascii bit_length btrim char_length character_length chr concat concat_ws convert_from convert_to
    decode encode format gen_random_uuid initcap left length lower lpad ltrim md5 normalize
    octet_length overlay position quote_ident quote_literal regexp_count regexp_like regexp_match
    regexp_matches regexp_replace regexp_split_to_array regexp_split_to_table regexp_substr repeat
    replace reverse right rpad rtrim sha224 sha256 sha384 sha512 split_part starts_with
    string_to_array strpos substr substring to_hex translate trim upper
    age at_time_zone clock_timestamp date_bin date_part date_trunc extract isfinite justify_days
    justify_hours justify_interval make_date make_interval make_time make_timestamp
    make_timestamptz now overlaps statement_timestamp timezone to_char to_date to_number
    to_timestamp transaction_timestamp
    coalesce generate_series generate_subscripts greatest least nullif num_nonnulls num_nulls unnest
    array_append array_cat array_dims array_length array_lower array_ndims array_position
    array_positions array_prepend array_remove array_replace array_to_json array_to_string
    array_upper cardinality isempty lower_inc lower_inf range_merge upper_inc upper_inf daterange
    int4range int8range numrange tsrange tstzrange
    json_array json_array_elements json_array_length json_build_array json_build_object json_each
    json_extract_path json_extract_path_text json_object json_object_keys json_typeof
    jsonb_array_elements jsonb_array_elements_text jsonb_array_length jsonb_build_array
    jsonb_build_object jsonb_each jsonb_each_text jsonb_exists jsonb_extract_path
    jsonb_extract_path_text jsonb_insert jsonb_object_keys jsonb_path_exists jsonb_path_match
    jsonb_path_query jsonb_path_query_array jsonb_path_query_first jsonb_set jsonb_strip_nulls
    jsonb_to_record jsonb_to_recordset jsonb_typeof row_to_json to_json to_jsonb
    numnode phraseto_tsquery plainto_tsquery querytree setweight strip to_tsquery to_tsvector
    ts_headline ts_rank ts_rank_cd websearch_to_tsquery
    akeys avals similarity strict_word_similarity unaccent word_similarity
    current_database current_schema current_schemas current_setting host masklen netmask network
    currval nextval pg_advisory_xact_lock pg_backend_pid pg_column_size pg_get_serial_sequence
    pg_relation_size pg_sleep pg_total_relation_size pg_try_advisory_xact_lock pg_typeof
    txid_current version
    """.split()
)

# Those of PostgreSQL, of its extensions that Django and its friends use, and of pgvector.
_OPERATORS = frozenset(
    """
    !! !~ !~* !~~ !~~* # ## #- #> #>> % %% & && &< &<| &> * *< *<= *<> *= *> *>= + - -> ->> -|- /
    < <-> << <<= <<| <= <> <@ <^ = > >= >> >>= >^ ? ?# ?& ?- ?-| ?| ?|| @ @-@ @> @? @@ @@@ ^ ^@ |
    |&> |/ |>> || ||/ ~ ~* ~<=~ ~<~ ~= ~>=~ ~>~ ~~ ~~* != <#> ~> #<# #<=# #= #># #>=# %# %> %>> <%
    <->> <->>> <<% <<-> <<<-> ?<@ ?@ ?@> ?~ ^<@ ^? ^@> ^~ <=> <+> <~> <%>
    """.split()
)


@remembered
def is_read(text: str) -> bool:
    """Whether a statement only reads, and so waits for nobody, as far as its text tells."""
    command = plain(text)
    return (
        command is not None
        and _READS.match(command) is not None
        and is_single(text)
        and not (any(word in command for word in _WAITING) and _WAITS.search(command))
    )


@remembered
def calls_known(text: str) -> bool:
    """Whether a statement calls no function and no operator but those known to leave the session
    alone: others may set something in it, which the statements behind would run with."""
    command = plain(text)
    return command is not None and not _unknown_calls(command)


def _unknown_calls(command: str) -> frozenset[str]:
    """The names of functions and operators that are not known to leave the session alone; "" for
    quoted ones."""
    command = _PLACEHOLDER.sub("", _INTO.sub("into (", command))
    return frozenset(
        match[1] or ""
        for match in _CALL.finditer(command)
        if match[1] not in _HARMLESS or command[match.start() - 1 : match.start()] == "."
    ).union(each for each in _OPERATOR.findall(command) if each not in _OPERATORS)


@remembered
def traces(text: str) -> bool | frozenset[str]:
    """What a statement leaves in the session: something, or whatever these functions leave."""
    if leaves_state(text) or makes_a_table(text):
        return True
    command = plain(text)
    if command is None:
        return False
    called = _unknown_calls(command)
    # What is left of set_config() by now is for the transaction only.
    return called if ".set_config" in command else called - {"set_config"}


# Of the known ones those that change something, or give something else each time or in another
# session.
_VOLATILE = re.compile(
    r"\b(?:nextval|currval|txid_current|random|gen_random_uuid|clock_timestamp|pg_backend_pid)"
    r"\s*+\("
)


@remembered
def only_reads(text: str) -> bool:
    """Whether a statement changes nothing and may be executed again elsewhere, as far as its text
    tells: what views, operators and row policies do is not seen in it."""
    return is_read(text) and calls_known(text) and not _VOLATILE.search(plain(text) or "")


_OF_SEQUENCES = re.compile(r"\b(?:nextval|currval)\b")
_LAST_DRAWN = re.compile(r"\b(?:currval|lastval)\b")


@remembered
def asks_for_drawn(text: str) -> bool:
    """Whether a statement asks for the number that another one had from a sequence."""
    return _LAST_DRAWN.search(plain(text) or "") is not None


@remembered
def draws(text: str) -> bool:
    """Whether a statement has a number from a sequence that the same session is asked for again."""
    return _OF_SEQUENCES.search(plain(text) or "") is not None


@remembered
def asks_who_serves(text: str) -> bool:
    """Whether a statement asks which process serves it, whose statements are to follow."""
    return "pg_backend_pid" in (plain(text) or "")


@remembered
def may_be_shared(text: str) -> bool:
    """Whether a statement may go to a connection together with others' that only read."""
    return is_read(text) and calls_known(text)


@remembered
def is_single(text: str) -> bool:
    """Whether a statement may be in a pipeline: one command, no session state, no COPY."""
    command = plain(text)
    return (
        command is not None
        and ";" not in command.rstrip("; \n\t")
        and _COMMANDS.match(command) is not None
        and not (leaves_state(text) or makes_a_table(text))
    )
