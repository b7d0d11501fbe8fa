"""DynamoDB: tables in memory, and the operations on them. Each runs to its end at once."""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import msgspec

from aws_standin.expressions import (
    COMPARATORS,
    Expressions,
    Item,
    Node,
    invalid,
    read_condition,
    read_projection,
)
from aws_standin.model import ACCOUNT, REGION, AwsError, Json, handler_name
from aws_standin.usage import Usage

MAX_ITEM_BYTES: Final = 409_600
MAX_TRANSACTION_BYTES: Final = 4_194_304
MAX_TRANSACTION_ITEMS: Final = 100
MAX_BATCH_GET_KEYS: Final = 100
MAX_QUERY_BYTES: Final = 1_048_576
TRANSACTION_TOKEN_S: Final = 600.0


class Table:
    """One table: partitions of items sorted by their sort key. String keys only."""

    def __init__(self, name: str, partition_key: str = "PK", sort_key: str | None = "SK") -> None:
        self.name = name
        self.partition_key = partition_key
        self.sort_key = sort_key
        self._partitions: dict[str, dict[str, Item]] = {}
        self._order: dict[str, list[str]] = {}

    @property
    def items(self) -> list[Item]:
        """All items, partition by partition in order of first use, sorted within."""
        return [
            self._partitions[partition][key]
            for partition, keys in self._order.items()
            for key in keys
        ]

    def key(self, item: Item, *, exact: bool) -> tuple[str, str]:
        """An item's key; `exact` if it may hold nothing else."""
        names = [self.partition_key, *([self.sort_key] if self.sort_key else ())]
        if exact and set(item) != set(names):
            raise invalid("The provided key element does not match the schema")
        values: list[str] = []
        for name in names:
            value = item.get(name, {}).get("S")
            if not isinstance(value, str):
                raise invalid(
                    "One or more parameter values were invalid: Missing the key "
                    f"{name} in the item, or type mismatch"
                )
            if not value:
                raise invalid(
                    "One or more parameter values are not valid. The AttributeValue for a key "
                    f"attribute cannot contain an empty string value. Key: {name}"
                )
            values.append(value)
        return values[0], values[1] if self.sort_key else ""

    def get(self, key: tuple[str, str]) -> Item | None:
        """The item with this key."""
        return self._partitions.get(key[0], {}).get(key[1])

    def put(self, key: tuple[str, str], item: Item) -> None:
        """Store an item; the caller does not change it afterwards."""
        partition = self._partitions.setdefault(key[0], {})
        if key[1] not in partition:
            insort(self._order.setdefault(key[0], []), key[1])
        partition[key[1]] = item

    def delete(self, key: tuple[str, str]) -> None:
        """Remove an item, if it is there."""
        if self._partitions.get(key[0], {}).pop(key[1], None) is not None:
            order = self._order[key[0]]
            del order[bisect_left(order, key[1])]

    def range(self, partition: str, low: str, high: str | None) -> list[str]:
        """The sort keys from `low` to `high`, both included, in order."""
        order = self._order.get(partition, [])
        end = len(order) if high is None else bisect_right(order, high)
        return order[bisect_left(order, low) : end]


class DynamoDb:
    """The operations of DynamoDB. Each runs to its end at once, so all are atomic."""

    def __init__(self, usage: Usage | None = None) -> None:
        self.tables: dict[str, Table] = {}
        self.usage = usage or Usage()
        self._tokens: dict[str, tuple[float, bytes]] = {}

    def perform(self, operation: str, request: Json, failed: Mapping[int, bool]) -> Json:
        """Do one operation; keys of a ``BatchGetItem`` in `failed` come back unprocessed."""
        if operation == "BatchGetItem":
            return self._batch_get(request, failed)
        handler: Callable[[Json], Json] | None = getattr(self, handler_name(operation), None)
        if handler is None:
            raise AwsError("UnknownOperationException", f"No operation {operation} here.")
        return handler(request)

    def _table(self, request: Json) -> Table:
        name = str(request.get("TableName") or "").rpartition("/")[2]
        table = self.tables.get(name)
        if table is None:
            raise AwsError("ResourceNotFoundException", "Requested resource not found")
        return table

    def _do_create_table(self, request: Json) -> Json:
        name = request["TableName"]
        if name in self.tables:
            raise AwsError("ResourceInUseException", f"Table already exists: {name}")
        keys = {k["KeyType"]: k["AttributeName"] for k in request["KeySchema"]}
        self.tables[name] = Table(name, keys["HASH"], keys.get("RANGE"))
        return {"TableDescription": self._describe(self.tables[name])}

    def _do_delete_table(self, request: Json) -> Json:
        table = self._table(request)
        del self.tables[table.name]
        return {"TableDescription": self._describe(table)}

    def _do_describe_table(self, request: Json) -> Json:
        return {"Table": self._describe(self._table(request))}

    def _do_update_time_to_live(self, request: Json) -> Json:
        self._table(request)
        return {"TimeToLiveSpecification": request["TimeToLiveSpecification"]}

    def _describe(self, table: Table) -> Json:
        schema = [{"AttributeName": table.partition_key, "KeyType": "HASH"}]
        if table.sort_key:
            schema.append({"AttributeName": table.sort_key, "KeyType": "RANGE"})
        return {
            "TableName": table.name,
            "TableStatus": "ACTIVE",
            "TableArn": f"arn:aws:dynamodb:{REGION}:{ACCOUNT}:table/{table.name}",
            "KeySchema": schema,
            "ItemCount": len(table.items),
        }

    def _do_get_item(self, request: Json) -> Json:
        table = self._table(request)
        item = table.get(table.key(request["Key"], exact=True))
        self._read(request, item)
        expressions = Expressions(request)
        return {"Item": _projected(request, expressions, item)} if item is not None else {}

    def _read(self, request: Json, *items: Item | None) -> None:
        """Count a read of these items together."""
        size = sum(_item_bytes(item) for item in items if item is not None)
        self.usage.read(size, consistent=bool(request.get("ConsistentRead")))

    def _do_put_item(self, request: Json) -> Json:
        return self._write("Put", request)

    def _do_update_item(self, request: Json) -> Json:
        return self._write("Update", request)

    def _do_delete_item(self, request: Json) -> Json:
        return self._write("Delete", request)

    def _write(self, action: str, request: Json) -> Json:
        write = Write(self._table(request), action, request)
        self.usage.wrote(write.item_bytes(), transaction=False)
        if not write.allowed:
            fields: Json = {"Item": write.old} if write.shows_old else {}
            raise AwsError(
                "ConditionalCheckFailedException", "The conditional request failed", **fields
            )
        write.apply()
        match request.get("ReturnValues"):
            case "ALL_OLD" | "UPDATED_OLD" if write.old is not None:
                return {"Attributes": write.old}
            case "ALL_NEW" | "UPDATED_NEW":
                return {"Attributes": write.new}
        return {}

    def _do_transact_write_items(self, request: Json) -> Json:
        token = request.get("ClientRequestToken")
        digest = msgspec.json.encode(request["TransactItems"])
        if token and self._done(token, digest):
            return {}
        operations = [next(iter(entry.items())) for entry in request["TransactItems"]]
        if not 1 <= len(operations) <= MAX_TRANSACTION_ITEMS:
            raise invalid(
                "1 validation error detected: Value at 'transactItems' failed to satisfy "
                "constraint: Member must have length less than or equal to 100"
            )
        writes = [Write(self._table(body), action, body) for action, body in operations]
        if len({(w.table.name, w.key) for w in writes}) < len(writes):
            raise invalid("Transaction request cannot include multiple operations on one item")
        if sum(_item_bytes(w.new) for w in writes if w.new) > MAX_TRANSACTION_BYTES:
            raise invalid("Member must have total size less than or equal to 4194304 bytes")
        for write in writes:
            self.usage.wrote(write.item_bytes(), transaction=True)
        if not all(w.allowed for w in writes):
            codes = ["None" if w.allowed else "ConditionalCheckFailed" for w in writes]
            raise AwsError(
                "TransactionCanceledException",
                "Transaction cancelled, please refer cancellation reasons for specific reasons "
                f"[{', '.join(codes)}]",
                CancellationReasons=[w.reason() for w in writes],
            )
        for write in writes:
            write.apply()
        if token:
            self._tokens[token] = (time.monotonic(), digest)
        return {}

    def _do_transact_get_items(self, request: Json) -> Json:
        gets = [entry["Get"] for entry in request["TransactItems"]]
        if not 1 <= len(gets) <= MAX_TRANSACTION_ITEMS:
            raise invalid(
                "1 validation error detected: Value at 'transactItems' failed to satisfy "
                "constraint: Member must have length less than or equal to 100"
            )
        found: list[Json] = []
        size = 0
        for get in gets:
            table = self._table(get)
            item = table.get(table.key(get["Key"], exact=True))
            size += 0 if item is None else _item_bytes(item)
            for _ in range(2):  # a transaction reads twice
                self._read({"ConsistentRead": True}, item)
            found.append({} if item is None else {"Item": _projected(get, Expressions(get), item)})
        if size > MAX_TRANSACTION_BYTES:
            raise invalid("Aggregated size of items to be retrieved exceeds 4194304 bytes")
        return {"Responses": found}

    def _done(self, token: str, digest: bytes) -> bool:
        """Whether the transaction with this token took effect within the last ten minutes."""
        oldest = time.monotonic() - TRANSACTION_TOKEN_S
        while self._tokens and (first := next(iter(self._tokens.items())))[1][0] < oldest:
            del self._tokens[first[0]]
        if token not in self._tokens:
            return False
        if self._tokens[token][1] != digest:
            raise AwsError(
                "IdempotentParameterMismatchException",
                "The request uses the same client token as a previous, but non-identical request.",
            )
        return True

    def _batch_get(self, request: Json, failed: Mapping[int, bool]) -> Json:
        responses: dict[str, list[Item]] = {}
        unprocessed: Json = {}
        index = 0
        for name, wanted in request["RequestItems"].items():
            table = self._table({"TableName": name})
            expressions = Expressions(wanted)
            keys = [table.key(k, exact=True) for k in wanted["Keys"]]
            if len(set(keys)) < len(keys):
                raise invalid("Provided list of item keys contains duplicates")
            found = responses.setdefault(name, [])
            for given, key in zip(wanted["Keys"], keys, strict=True):
                if index in failed:
                    left = unprocessed.setdefault(name, {**wanted, "Keys": []})
                    left["Keys"].append(given)
                else:
                    item = table.get(key)
                    self._read(wanted, item)
                    if item is not None:
                        found.append(_projected(wanted, expressions, item))
                index += 1
        if not 1 <= index <= MAX_BATCH_GET_KEYS:
            raise invalid("Too many items requested for the BatchGetItem call")
        return {"Responses": responses, "UnprocessedKeys": unprocessed}

    def _do_query(self, request: Json) -> Json:
        table = self._table(request)
        expressions = Expressions(request)
        partition, low, high, condition = _key_range(table, request, expressions)
        keys = table.range(partition, low, high)
        if request.get("ScanIndexForward") is False:
            keys.reverse()
        if start := request.get("ExclusiveStartKey"):
            after = table.key(start, exact=True)[1]
            backward = request.get("ScanIndexForward") is False
            keys = [k for k in keys if (k < after if backward else k > after)]
        items = (table.get((partition, key)) or {} for key in keys)
        return self._page(
            table, request, expressions, (i for i in items if expressions.holds(condition, i))
        )

    def _do_scan(self, request: Json) -> Json:
        table = self._table(request)
        items = iter(table.items)
        if start := request.get("ExclusiveStartKey"):
            after = table.key(start, exact=True)
            for item in items:
                if table.key(item, exact=False) == after:
                    break
        return self._page(table, request, Expressions(request), items)

    def _page(
        self, table: Table, request: Json, expressions: Expressions, items: Iterator[Item]
    ) -> Json:
        looked_at: list[Item] = []
        answer = _page(table, request, expressions, items, looked_at)
        self._read(request, *looked_at)
        return answer


class Write:
    """One write, alone or of a transaction: its condition decided, its effect prepared."""

    def __init__(self, table: Table, action: str, request: Json) -> None:
        self.table = table
        self.shows_old = request.get("ReturnValuesOnConditionCheckFailure") == "ALL_OLD"
        self._action = action
        expressions = Expressions(request)
        if action == "Put":
            self.key = table.key(request["Item"], exact=False)
        elif action in ("Update", "Delete", "ConditionCheck"):
            self.key = table.key(request["Key"], exact=True)
        else:
            raise invalid(f"Unknown transaction action {action}")
        self.old = table.get(self.key)
        condition = request.get("ConditionExpression")
        self.allowed = not condition or expressions.holds(read_condition(condition), self.old or {})
        self.new: Item | None = None
        if action == "Put":
            self.new = request["Item"]
        elif action == "Update" and self.allowed:
            self.new = expressions.update(request, self.old or dict(request["Key"]))
        if self.new is not None and _item_bytes(self.new) > MAX_ITEM_BYTES:
            raise invalid("Item size has exceeded the maximum allowed size")

    def item_bytes(self) -> int:
        """What the write is billed for: the larger of the item before and after."""
        return max(_item_bytes(item) if item else 0 for item in (self.old, self.new))

    def apply(self) -> None:
        """Take effect."""
        if self.new is not None:
            self.table.put(self.key, self.new)
        elif self._action == "Delete":
            self.table.delete(self.key)

    def reason(self) -> Json:
        """This write's entry of ``CancellationReasons``."""
        if self.allowed:
            return {"Code": "None"}
        shown = {"Item": self.old} if self.shows_old and self.old is not None else {}
        return {
            "Code": "ConditionalCheckFailed",
            "Message": "The conditional request failed",
            **shown,
        }


def _item_bytes(item: Item) -> int:
    """An item's size as DynamoDB counts it, but for rounding: names and values in UTF-8."""

    def size(value: Any) -> int:
        if isinstance(value, str):
            return len(value.encode())
        if isinstance(value, list):
            return sum(size(v) + 1 for v in value)
        if isinstance(value, dict):
            return sum(len(k.encode()) + size(v) for k, v in value.items())
        return 1

    def attribute(kind: str, value: Any) -> int:
        # Two digits a byte and one more; binary values travel in base64.
        return {"N": len(str(value)) // 2 + 2, "B": len(str(value)) * 3 // 4}.get(kind) or size(
            value
        )

    return sum(len(n.encode()) + attribute(*next(iter(v.items()))) for n, v in item.items())


def _projected(request: Json, expressions: Expressions, item: Item) -> Item:
    """The attributes asked for. Nested paths are answered with their whole top attribute."""
    if not request.get("ProjectionExpression"):
        return item
    names = {str(expressions.path(p)[0]) for p in read_projection(request["ProjectionExpression"])}
    return {k: v for k, v in item.items() if k in names}


def _key_range(
    table: Table, request: Json, expressions: Expressions
) -> tuple[str, str, str | None, Node]:
    """What a key condition selects: partition, lowest and highest sort key, and the rest of it."""
    if not request.get("KeyConditionExpression"):
        raise invalid("Either the KeyConditions or KeyConditionExpression parameter must be given")
    node = read_condition(request["KeyConditionExpression"])
    partition, low, high = "", "", None
    for part in node[1:] if node[0] == "and" else (node,):
        name = expressions.path(part[1])[0] if part[1][0] == "path" else None
        operands = [(expressions.get(o, {}) or {}).get("S") for o in part[2:]]
        if not operands or not all(isinstance(o, str) for o in operands):
            raise invalid("Query key condition not supported")
        first = str(operands[0])
        if name == table.partition_key and part[0] == "=":
            partition = first
        elif name == table.sort_key and part[0] in (*COMPARATORS, "between", "begins_with"):
            if part[0] not in ("<", "<="):
                low = first
            high = {"=": first, "<": first, "<=": first, "between": operands[-1]}.get(part[0])
            if part[0] == "between" and str(high) < low:
                raise invalid(
                    "The BETWEEN operator requires upper bound to be greater than or equal to "
                    "lower bound"
                )
            if part[0] == "begins_with":
                high = first + "\U0010ffff"
        else:
            raise invalid("Query key condition not supported")
    if not partition:
        raise invalid(f"Query condition missed key schema element: {table.partition_key}")
    return partition, low, high, node


def _page(
    table: Table,
    request: Json,
    expressions: Expressions,
    items: Iterator[Item],
    looked_at: list[Item],
) -> Json:
    """One page of a query or scan: `Limit` items or 1 MB looked at, whichever comes first."""
    limit = int(request.get("Limit") or 1 << 31)
    keep = request.get("FilterExpression")
    found: list[Item] = []
    scanned = size = 0
    last: Item | None = None
    for item in items:
        if scanned == limit or size >= MAX_QUERY_BYTES:
            break
        scanned += 1
        size += _item_bytes(item)
        looked_at.append(item)
        last = item
        if not keep or expressions.holds(read_condition(keep), item):
            found.append(_projected(request, expressions, item))
    else:
        # DynamoDB names a last key also when Limit is hit exactly at the end.
        last = last if scanned == limit else None
    answer: Json = {"Count": len(found), "ScannedCount": scanned}
    if request.get("Select") != "COUNT":
        answer["Items"] = found
    if last is not None:
        names = (table.partition_key, table.sort_key)
        answer["LastEvaluatedKey"] = {n: last[n] for n in names if n}
    return answer
