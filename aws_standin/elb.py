"""Elastic Load Balancing: one target group, whose targets' states a test sets."""

from __future__ import annotations

from typing import Final

from aws_standin.model import ACCOUNT, REGION, AwsError, Json

TARGET_GROUP_ARN: Final = (
    f"arn:aws:elasticloadbalancing:{REGION}:{ACCOUNT}:targetgroup/agenticai/0123456789abcdef"
)


class Elb:
    """The health of targets.

    Attributes:
        states: by address and port; who is not in it is not registered.
    """

    def __init__(self) -> None:
        self.states: dict[tuple[str, int], str] = {}

    def perform(self, operation: str, request: Json) -> Json:
        """Do one operation and return its result for `_xml`."""
        if operation != "DescribeTargetHealth":
            raise AwsError("InvalidAction", f"There is no operation {operation} here.")
        if request["TargetGroupArn"] != TARGET_GROUP_ARN:
            raise AwsError("TargetGroupNotFound", "One or more target groups not found")
        asked = [(target["Id"], int(target["Port"])) for target in request.get("Targets", ())]
        return {"TargetHealthDescriptions": {"member": [self._describe(t) for t in asked]}}

    def _describe(self, target: tuple[str, int]) -> Json:
        address, port = target
        health = {"State": self.states.get(target, "unused")}
        if target not in self.states:
            health["Reason"] = "Target.NotRegistered"
        return {"Target": {"Id": address, "Port": port}, "TargetHealth": health}
