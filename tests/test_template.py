"""The template, parameter by parameter and resource by resource, in its own order.

What the stand-in for CloudFormation (moto) creates is asked of the AWS it stands in for. What it
leaves out without a word is asserted on the evaluated template; ``NOT_CREATED_BY_MOTO`` keeps the
account of that. Nothing here needs the network or credentials.
"""

from __future__ import annotations

import ast
import dataclasses
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, cast

import boto3
import botocore.session
import pytest
from botocore import xform_name
from hypothesis import given
from hypothesis import strategies as st
from moto import mock_aws
from moto.elbv2.models import FakeLoadBalancer, FakeTargetGroup

import server
from tests import template
from tests.generated import shown
from tests.template import Stack, iam_actions, rules_hold

ROOT = template.PATH.parent
TEMPLATE = template.load()
RESOURCES = TEMPLATE["Resources"]
PARAMETERS = TEMPLATE["Parameters"]

IMAGE = "123456789012.dkr.ecr.us-east-1.amazonaws.com/agenticai-websocket-prod@sha256:" + "0" * 64
NAMESPACE = "AgenticAI/WebSocket"
CERTIFICATE = "arn:aws:acm:us-east-1:123456789012:certificate/11111111-2222-3333-4444-555555555555"

EC2_TEXT = r"[\w .:/()#,@\[\]+=&;{}!$*-]{1,255}"
"""What EC2 takes as a description: no apostrophe, for one. Neither cfn-lint nor moto knows."""

NOT_CREATED_BY_MOTO = {
    "AWS::ApplicationAutoScaling::ScalableTarget",
    "AWS::ApplicationAutoScaling::ScalingPolicy",
    "AWS::CloudWatch::Alarm",
    "AWS::SNS::Subscription",
    "AWS::SNS::TopicPolicy",
    "AWS::SQS::QueuePolicy",
    "AWS::WAFv2::WebACLAssociation",
}
"""Types that moto skips with a warning: each is asserted on the evaluated template below."""


def variables() -> dict[str, str]:
    """Parameter to the variable of the container that is nothing but its value."""
    (container,) = RESOURCES["TaskDefinition"]["Properties"]["ContainerDefinitions"]
    return {
        item["Value"]["Ref"]: item["Name"]
        for item in container["Environment"]
        if isinstance(item["Value"], dict) and item["Value"].get("Ref") in PARAMETERS
    }


VARIABLES = variables()

PATTERNS = [name for name in VARIABLES if "AllowedPattern" in PARAMETERS[name]]
"""Parameters that become settings, and whose values are text of some form."""


@pytest.fixture(scope="module")
def whole() -> dict[str, str]:
    """Variables with which the server starts, tokens and all."""
    stack = Stack(
        ContainerImage=IMAGE,
        AuthJwksUrl="https://issuer.example.com/keys.json",
        AuthIssuer="https://issuer.example.com",
        AuthAudience="gateway",
    )
    return realistic(stack.container_environment())


@pytest.fixture(scope="module")
def bare() -> Stack:
    """The first deployment: no image, no certificate."""
    return Stack()


@pytest.fixture(scope="module")
def full() -> Stack:
    """Everything that a parameter can switch on."""
    return Stack(
        ContainerImage=IMAGE,
        CertificateArn=CERTIFICATE,
        DomainName="ws.example.com",
        HostedZoneId="Z0123456789ABCDEFGHIJ",
        WebAclArn="arn:aws:wafv2:us-east-1:123456789012:regional/webacl/gateway/11111111",
        AccessLogsBucketName="example-logs",
        NotificationEmail="oncall@example.com",
    )


def of_type(resource_type: str) -> dict[str, Any]:
    return {name: r for name, r in RESOURCES.items() if r["Type"] == resource_type}


def attributes(properties: dict[str, Any], kind: str) -> dict[str, str]:
    return {item["Key"]: item["Value"] for item in properties[kind]}


class TestLinters:
    def test_cfn_lint_finds_nothing(self) -> None:
        """cfn-lint, whose rules hold CloudFormation's own schemas, has no remark."""
        done = subprocess.run(
            [Path(sys.executable).parent / "cfn-lint", "--format", "parseable", template.PATH],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout + done.stderr) == (0, "")

    def test_checkov_finds_only_what_is_argued(self) -> None:
        """Checkov fails nothing, and skips exactly what has an argument beside the resource."""
        checkov = os.environ.get("CHECKOV") or shutil.which("checkov")
        if checkov is None:
            pytest.skip(
                "checkov is not installed; its pins differ from ours, so it wants an environment of"
                " its own: python -m venv .checkov && .checkov/bin/pip install checkov,"
                " then CHECKOV=.checkov/bin/checkov"
            )
        path = str(template.PATH)
        done = subprocess.run(
            [
                checkov,
                "--skip-download",
                "--framework=cloudformation",
                "--output=json",
                "--file",
                path,
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        results = json.loads(done.stdout)["results"]
        failed = [f"{check['check_id']} {check['resource']}" for check in results["failed_checks"]]
        assert failed == []
        assert results["passed_checks"]
        skipped = {(c["check_id"], c["resource"].split(".")[-1]) for c in results["skipped_checks"]}
        assert skipped == set(argued_exceptions())

    def test_every_exception_is_argued(self) -> None:
        assert argued_exceptions()
        for comment in argued_exceptions().values():
            assert len(comment.split()) >= 8

    def test_is_short_enough_to_be_sent(self) -> None:
        """A template sent as text may have 51,200 bytes; what is sent leaves room to grow."""
        text = template.PATH.read_text("utf-8")
        sent = template.without_comments(text)
        assert template.parse(sent) == TEMPLATE
        assert len(sent.encode()) <= 51_200 - 6 * 1024
        attributes = (ROOT / ".gitattributes").read_text("utf-8")
        assert "*.yaml text eol=lf" in attributes  # Windows must not add a byte a line


def argued_exceptions() -> dict[tuple[str, str], str]:
    """(check, resource) to argument, from the comments checkov reads."""
    found, resource = {}, ""
    for line in template.PATH.read_text("utf-8").splitlines():
        if name := re.match(r"  (\w+):$", line):
            resource = name[1]
        if skip := re.match(r"    # checkov:skip=(\w+): (.+)$", line):
            found[skip[1], resource] = skip[2]
    return found


class TestParameters:
    @pytest.mark.parametrize("name", PARAMETERS)
    def test_is_described(self, name: str) -> None:
        assert PARAMETERS[name]["Description"].endswith(".")

    @pytest.mark.parametrize("name", PARAMETERS)
    def test_is_constrained(self, name: str) -> None:
        """A wrong value is refused before anything is made."""
        parameter = PARAMETERS[name]
        by_type = "AWS::" in parameter["Type"]
        by_rule = parameter.keys() & {"AllowedPattern", "AllowedValues", "MinValue"}
        assert by_type or by_rule
        assert ("AllowedPattern" in parameter) == ("ConstraintDescription" in parameter)

    @pytest.mark.parametrize("name", PARAMETERS)
    def test_default_passes_its_own_constraint(self, name: str) -> None:
        parameter = PARAMETERS[name]
        default = parameter.get("Default", template.REQUIRED_PARAMETERS.get(name))
        assert accepts(parameter, str(default))

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("Environment", "Prod"),
            ("Environment", "pre-prod"),
            ("Environment", "a" * 13),
            ("ContainerImage", "just-a-name"),
            ("AllowedCidr", "everyone"),
            ("WebAclArn", "arn:aws:wafv2:us-east-1:123456789012:global/webacl/x/1"),
            ("CertificateArn", "arn:aws:iam::123456789012:server-certificate/x"),
            ("DomainName", "https://ws.example.com"),
            ("HostedZoneId", "/hostedzone/Z012"),
            ("PMQueueUrl", "agenticai-pm"),
            ("TaskCpu", "2048"),
            ("MinTasks", "0"),
            ("DrainSeconds", "120"),
            ("AuthJwksUrl", "http://issuer.example.com/keys"),
            ("AuthJwksUrl", "https:///keys"),
            ("AuthJwksUrl", "https://issuer.example.com:8443/keys"),  # the tasks reach 443 alone
            ("KmsKeyArns", "alias/mine"),
            ("AuthIssuer", " "),
            ("AuthDeadlineSeconds", "0"),
            ("AuthDeadlineSeconds", "301"),
            ("AllowedOrigins", "*"),
            ("AllowedOrigins", "app.example.com"),
            ("AllowedOrigins", "https://app.example.com/"),
            ("AllowedOrigins", "https://app.example.com https://admin.example.com"),
            ("MaxSubscriptionsPerConnection", "10001"),
            ("NotificationEmail", "on call"),
        ],
    )
    def test_refuses(self, name: str, value: str) -> None:
        assert not accepts(PARAMETERS[name], value)

    def test_each_is_in_one_group(self) -> None:
        groups = TEMPLATE["Metadata"]["AWS::CloudFormation::Interface"]["ParameterGroups"]
        grouped = [name for group in groups for name in group["Parameters"]]
        assert grouped == list(PARAMETERS)
        assert all(group["Label"]["default"] for group in groups)

    def test_memory_fits_cpu(self) -> None:
        """The rules let through what Fargate offers, and nothing else."""
        offered = {
            "256": {"512", "1024", "2048"},
            "512": {"1024", "2048", "3072", "4096"},
            "1024": {"2048", "3072", "4096", "8192"},
        }
        for cpu in PARAMETERS["TaskCpu"]["AllowedValues"]:
            for memory in PARAMETERS["TaskMemory"]["AllowedValues"]:
                passes = rules_hold(Stack(TaskCpu=cpu, TaskMemory=memory))
                assert passes == (memory in offered[cpu])

    def test_hosted_zone_needs_domain(self) -> None:
        assert not rules_hold(Stack(HostedZoneId="Z1"))
        assert rules_hold(Stack(HostedZoneId="Z1", DomainName="ws.example.com"))
        assert rules_hold(Stack(DomainName="ws.example.com"))

    @pytest.mark.parametrize(
        ("given", "holds"),
        [
            ({}, True),
            ({"AuthJwksUrl": "https://i/k"}, False),
            ({"AuthJwksUrl": "https://i/k", "AuthIssuer": "i"}, False),
            ({"AuthJwksUrl": "https://i/k", "AuthIssuer": "i", "AuthAudience": "a"}, True),
            ({"AuthIssuer": "i", "AuthAudience": "a"}, False),
            ({"AuthIssuer": "i"}, False),
            ({"AuthFirstMessage": "on"}, False),
            ({"AuthProjectsClaim": "p"}, False),
        ],
    )
    def test_half_an_authentication_is_refused(self, given: dict[str, str], holds: bool) -> None:
        """Rather no deployment than one that is open although it was told whom to trust."""
        assert rules_hold(Stack(**given)) == holds

    def test_conditions_are_named_has(self) -> None:
        assert all(re.fullmatch(r"Has[A-Z]\w+", name) for name in TEMPLATE["Conditions"])


def accepts(parameter: dict[str, Any], value: str) -> bool:
    """Whether CloudFormation would take ``value``."""
    if "AllowedPattern" in parameter and not re.fullmatch(parameter["AllowedPattern"], value):
        return False
    if "AllowedValues" in parameter and value not in map(str, parameter["AllowedValues"]):
        return False
    low, high = parameter.get("MinValue"), parameter.get("MaxValue")
    return (low is None or int(value) >= low) and (high is None or int(value) <= high)


class MotoStack:
    """One stack in moto, and what its parts are there."""

    def __init__(self) -> None:
        ec2 = boto3.client("ec2")
        vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
        subnets = ",".join(
            ec2.create_subnet(VpcId=vpc, CidrBlock=f"10.0.{i}.0/24", AvailabilityZone=zone)[
                "Subnet"
            ]["SubnetId"]
            for i, zone in enumerate(("us-east-1a", "us-east-1b"))
        )
        self.network = {"VpcId": vpc, "LoadBalancerSubnetIds": subnets, "TaskSubnetIds": subnets}
        acm = boto3.client("acm")
        self.certificate = acm.request_certificate(DomainName="ws.example.com")["CertificateArn"]
        route53 = boto3.client("route53")
        zone = route53.create_hosted_zone(Name="example.com", CallerReference="1")["HostedZone"]
        self.zone_id = zone["Id"].removeprefix("/hostedzone/")
        self.skipped: set[str] = set()
        self._cloudformation = boto3.client("cloudformation")

    def deploy(self, **parameters: str) -> dict[str, str]:
        """Create or update the stack; the outputs."""
        values = {**template.REQUIRED_PARAMETERS, **self.network, **parameters}
        exists = self._cloudformation.list_stacks(StackStatusFilter=["CREATE_COMPLETE"])
        call = (
            self._cloudformation.update_stack
            if exists["StackSummaries"]
            else self._cloudformation.create_stack
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call(
                StackName="agenticai-websocket-stack",
                TemplateBody=template.PATH.read_text("utf-8"),
                Parameters=[{"ParameterKey": k, "ParameterValue": v} for k, v in values.items()],
                Capabilities=["CAPABILITY_IAM"],
            )
        for warning in caught:
            if found := re.search(r"Tried to parse (AWS::\S+)", str(warning.message)):
                self.skipped.add(found[1])
        (stack,) = self._cloudformation.describe_stacks()["Stacks"]
        assert stack["StackStatus"] in ("CREATE_COMPLETE", "UPDATE_COMPLETE")
        return {output["OutputKey"]: output["OutputValue"] for output in stack["Outputs"]}

    def delete(self) -> None:
        self._cloudformation.delete_stack(StackName="agenticai-websocket-stack")

    def listeners(self) -> dict[int, Any]:
        elb = boto3.client("elbv2")
        (balancer,) = elb.describe_load_balancers()["LoadBalancers"]
        found = elb.describe_listeners(LoadBalancerArn=balancer["LoadBalancerArn"])["Listeners"]
        return {listener["Port"]: listener for listener in found}


@pytest.fixture
def moto_stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[MotoStack]:
    """An empty AWS inside this process, with a network, a certificate and a hosted zone."""
    for name in ("AWS_ENDPOINT_URL", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    # moto lacks the two names that CloudWatch uses for a load balancer's parts.
    ask_balancer = cast("Any", FakeLoadBalancer.get_cfn_attribute)

    def balancer_attribute(self: Any, name: str) -> Any:
        if name == "LoadBalancerFullName":
            return self.arn.partition(":loadbalancer/")[2]
        return ask_balancer(self, name)

    def target_group_attribute(self: Any, name: str) -> Any:
        assert name == "TargetGroupFullName"
        return self.arn.rpartition(":")[2]

    monkeypatch.setattr(FakeLoadBalancer, "get_cfn_attribute", balancer_attribute)
    monkeypatch.setattr(FakeTargetGroup, "get_cfn_attribute", target_group_attribute, raising=False)
    with mock_aws():
        yield MotoStack()


class TestStack:
    """The stack as a whole, on moto."""

    def test_first_deployment_has_everything_but_the_service(self, moto_stack: MotoStack) -> None:
        outputs = moto_stack.deploy()
        assert outputs.keys() == TEMPLATE["Outputs"].keys() - {"WebSocketServiceName"}
        assert outputs["WebSocketEndpoint"] == f"ws://{outputs['LoadBalancerDNS']}"
        assert outputs["ECSClusterName"] == "agenticai-cluster-prod"
        assert outputs["WebSocketRepositoryUri"].endswith("/agenticai-websocket-prod")
        assert outputs["UpdatesQueueUrl"].endswith("/agenticai-updates-prod.fifo")
        assert outputs["UpdatesQueueArn"].endswith(":agenticai-updates-prod.fifo")
        assert outputs["UpdatesTopicArn"].endswith(":agenticai-updates-prod")
        assert ":targetgroup/agenticai-tg-prod/" in outputs["TargetGroupArn"]
        assert outputs["DashboardUrl"].endswith(
            "=us-east-1#dashboards/dashboard/agenticai-websocket-prod"
        )
        assert (
            boto3.client("ecs").list_services(cluster="agenticai-cluster-prod")["serviceArns"] == []
        )

    def test_second_deployment_adds_the_service(self, moto_stack: MotoStack) -> None:
        before = moto_stack.deploy()
        after = moto_stack.deploy(ContainerImage=IMAGE)
        assert after["WebSocketServiceName"] == "agenticai-websocket-prod"
        del after["WebSocketServiceName"]
        assert after == before

    def test_without_a_certificate_port_80_serves(self, moto_stack: MotoStack) -> None:
        outputs = moto_stack.deploy(ContainerImage=IMAGE)
        assert outputs["WebSocketEndpoint"] == f"ws://{outputs['LoadBalancerDNS']}"
        listeners = moto_stack.listeners()
        assert listeners.keys() == {80}
        assert listeners[80]["DefaultActions"][0]["Type"] == "forward"

    def test_with_a_certificate_port_443_serves_and_80_redirects(
        self, moto_stack: MotoStack
    ) -> None:
        outputs = moto_stack.deploy(ContainerImage=IMAGE, CertificateArn=moto_stack.certificate)
        assert outputs["WebSocketEndpoint"] == f"wss://{outputs['LoadBalancerDNS']}"
        listeners = moto_stack.listeners()
        assert listeners.keys() == {80, 443}
        assert listeners[80]["DefaultActions"][0]["Type"] == "redirect"
        assert listeners[443]["Protocol"] == "HTTPS"
        assert listeners[443]["DefaultActions"][0]["TargetGroupArn"] == outputs["TargetGroupArn"]

    def test_domain_gets_its_record(self, moto_stack: MotoStack) -> None:
        outputs = moto_stack.deploy(
            CertificateArn=moto_stack.certificate,
            DomainName="ws.example.com",
            HostedZoneId=moto_stack.zone_id,
        )
        assert outputs["WebSocketEndpoint"] == "wss://ws.example.com"
        records = boto3.client("route53").list_resource_record_sets(HostedZoneId=moto_stack.zone_id)
        (record,) = (r for r in records["ResourceRecordSets"] if r["Type"] == "A")
        assert record["Name"].rstrip(".") == "ws.example.com"
        assert record["AliasTarget"]["DNSName"].rstrip(".") == outputs["LoadBalancerDNS"]

    def test_domain_kept_elsewhere_makes_no_record(self) -> None:
        stack = Stack(CertificateArn=CERTIFICATE, DomainName="ws.example.com")
        assert stack.outputs["WebSocketEndpoint"] == "wss://ws.example.com"
        assert "DnsRecord" not in stack.resources

    def test_two_environments_live_side_by_side(self) -> None:
        """No name is said twice: CloudFormation would refuse the second stack half way."""
        keys = r"(\w+Name|Family|Name)"
        for name in Stack(ContainerImage=IMAGE).resources:
            one, other = (
                Stack(ContainerImage=IMAGE, Environment=environment).resources[name]
                for environment in ("prod", "staging")
            )
            for key, value in one.items():
                if re.fullmatch(keys, key) and key not in ("MetricName", "DomainName"):
                    assert value != other[key], f"{name}.{key}"

    def test_deletion_leaves_nothing(self, moto_stack: MotoStack) -> None:
        """Of what moto deletes; it has no deletion of ECS's parts and of target groups."""
        moto_stack.deploy(ContainerImage=IMAGE, CertificateArn=moto_stack.certificate)
        ec2 = boto3.client("ec2")
        assert boto3.client("sqs").list_queues()["QueueUrls"]
        moto_stack.delete()
        assert "QueueUrls" not in boto3.client("sqs").list_queues()
        assert boto3.client("sns").list_topics()["Topics"] == []
        assert boto3.client("dynamodb").list_tables()["TableNames"] == []
        assert boto3.client("ecr").describe_repositories()["repositories"] == []
        assert boto3.client("logs").describe_log_groups()["logGroups"] == []
        assert boto3.client("iam").list_roles()["Roles"] == []
        assert boto3.client("elbv2").describe_load_balancers()["LoadBalancers"] == []
        assert boto3.client("cloudwatch").list_dashboards()["DashboardEntries"] == []
        groups = ec2.describe_security_groups()["SecurityGroups"]
        assert {group["GroupName"] for group in groups} == {"default"}

    def test_nothing_is_kept_on_deletion(self) -> None:
        """Every resource goes with the stack, also those that moto cannot delete."""
        for resource in RESOURCES.values():
            assert resource.get("DeletionPolicy", "Delete") == "Delete"
            assert resource.get("UpdateReplacePolicy", "Delete") == "Delete"
        assert RESOURCES["WebSocketRepository"]["Properties"]["EmptyOnDelete"] is True
        assert not of_type("AWS::S3::Bucket")  # one with logs in it could not be deleted

    def test_what_moto_leaves_out_is_known(self, moto_stack: MotoStack) -> None:
        """A type that moto begins or ceases to create is noticed here."""
        moto_stack.deploy(
            ContainerImage=IMAGE,
            WebAclArn="arn:aws:wafv2:us-east-1:123456789012:regional/webacl/gateway/11111111",
            NotificationEmail="oncall@example.com",
        )
        assert moto_stack.skipped == NOT_CREATED_BY_MOTO

    def test_every_condition_combination_evaluates(self) -> None:
        """No resource or output refers to one that its own condition does not imply."""
        optional = {
            "ContainerImage": IMAGE,
            "CertificateArn": CERTIFICATE,
            "DomainName": "ws.example.com",
            "HostedZoneId": "Z1",
            "NotificationEmail": "oncall@example.com",
            "AccessLogsBucketName": "example-logs",
        }
        for chosen in range(2 ** len(optional)):
            given = {k: v for i, (k, v) in enumerate(optional.items()) if chosen >> i & 1}
            stack = Stack(**given)
            assert stack.resources
            assert stack.outputs


class TestNetwork:
    def test_only_the_load_balancer_reaches_the_tasks(self, full: Stack) -> None:
        assert "SecurityGroupIngress" not in full.resources["TaskSecurityGroup"]
        ingress = full.resources["TaskIngress"]
        assert ingress["GroupId"] == "<TaskSecurityGroup>"
        assert ingress["SourceSecurityGroupId"] == "<LoadBalancerSecurityGroup>"
        assert ingress["FromPort"] == ingress["ToPort"] == 8080
        assert not {"CidrIp", "CidrIpv6"} & ingress.keys()

    def test_load_balancer_reaches_only_the_tasks(self, full: Stack) -> None:
        (egress,) = full.resources["LoadBalancerSecurityGroup"]["SecurityGroupEgress"]
        assert egress["DestinationSecurityGroupId"] == "<TaskSecurityGroup>"
        assert egress["FromPort"] == egress["ToPort"] == 8080

    def test_tasks_reach_only_tls(self, full: Stack) -> None:
        (egress,) = full.resources["TaskSecurityGroup"]["SecurityGroupEgress"]
        assert (egress["IpProtocol"], egress["FromPort"], egress["ToPort"]) == ("tcp", 443, 443)

    def test_https_is_open_only_with_a_certificate(self, bare: Stack, full: Stack) -> None:
        assert "LoadBalancerHttpsIngress" not in bare.resources
        assert full.resources["LoadBalancerHttpsIngress"]["FromPort"] == 443

    def test_allowed_range_narrows_both_ports(self) -> None:
        stack = Stack(CertificateArn=CERTIFICATE, AllowedCidr="203.0.113.0/24")
        (http_rule,) = stack.resources["LoadBalancerSecurityGroup"]["SecurityGroupIngress"]
        assert http_rule["CidrIp"] == "203.0.113.0/24"
        assert stack.resources["LoadBalancerHttpsIngress"]["CidrIp"] == "203.0.113.0/24"

    def test_every_rule_says_why(self, full: Stack) -> None:
        rules = [
            properties
            for name, properties in full.resources.items()
            if RESOURCES[name]["Type"] == "AWS::EC2::SecurityGroupIngress"
        ]
        for name in ("TaskSecurityGroup", "LoadBalancerSecurityGroup"):
            rules += full.resources[name].get("SecurityGroupIngress", [])
            rules += full.resources[name]["SecurityGroupEgress"]
        assert len(rules) == 5
        assert all(re.fullmatch(EC2_TEXT, rule["Description"]) for rule in rules)
        for name in ("TaskSecurityGroup", "LoadBalancerSecurityGroup"):
            assert re.fullmatch(EC2_TEXT, full.resources[name]["GroupDescription"])


class TestLoadBalancer:
    def test_holds_quiet_connections(self, bare: Stack) -> None:
        balancer = attributes(bare.resources["LoadBalancer"], "LoadBalancerAttributes")
        assert balancer["idle_timeout.timeout_seconds"] == "4000"
        ping = server.Settings.__dataclass_fields__["ping_interval_seconds"].default
        assert 2 * float(cast("float", ping)) < 4000

    def test_access_logs_by_parameter(self, bare: Stack, full: Stack) -> None:
        off = attributes(bare.resources["LoadBalancer"], "LoadBalancerAttributes")
        on = attributes(full.resources["LoadBalancer"], "LoadBalancerAttributes")
        assert off["access_logs.s3.enabled"] == "false"
        assert "access_logs.s3.bucket" not in off
        assert on["access_logs.s3.enabled"] == "true"
        assert on["access_logs.s3.bucket"] == "example-logs"

    def test_web_acl_by_parameter(self, bare: Stack, full: Stack) -> None:
        assert "WebAclAssociation" not in bare.resources
        association = full.resources["WebAclAssociation"]
        assert association["ResourceArn"] == "<LoadBalancer>"
        assert association["WebACLArn"] == full.parameters["WebAclArn"]

    def test_target_group_asks_health(self, bare: Stack) -> None:
        group = bare.resources["TargetGroup"]
        assert group["Name"] == "agenticai-tg-prod"
        assert len(Stack(Environment="a" * 12).resources["TargetGroup"]["Name"]) <= 32
        assert len(Stack(Environment="a" * 12).resources["LoadBalancer"]["Name"]) <= 32
        assert group["HealthCheckPath"] == "/health"
        assert group["HealthCheckIntervalSeconds"] == 10
        assert group["HealthyThresholdCount"] == group["UnhealthyThresholdCount"] == 2
        assert group["TargetType"] == "ip"
        balancing = attributes(group, "TargetGroupAttributes")
        assert balancing["load_balancing.algorithm.type"] == "least_outstanding_requests"

    @pytest.mark.parametrize("drain_s", PARAMETERS["DrainSeconds"]["AllowedValues"])
    def test_deregistration_leaves_the_drain_its_time(self, drain_s: str) -> None:
        """The balancer cuts nobody whom the drain has not reached, and ECS kills no drain."""
        stack = Stack(ContainerImage=IMAGE, DrainSeconds=drain_s)
        group = attributes(stack.resources["TargetGroup"], "TargetGroupAttributes")
        delay_s = int(group["deregistration_delay.timeout_seconds"])
        noticed_s = 1.2 * server.TargetHealth.EVERY_S + server.CALL_TIMEOUT_S
        assert delay_s >= noticed_s + int(drain_s) + 10
        (container,) = stack.resources["TaskDefinition"]["ContainerDefinitions"]
        assert container["StopTimeout"] == 120 > int(drain_s)

    def test_https_refuses_old_tls(self, full: Stack) -> None:
        assert full.resources["HttpsListener"]["SslPolicy"] == "ELBSecurityPolicy-TLS13-1-2-2021-06"
        (action,) = full.resources["HttpListener"]["DefaultActions"]
        assert action["RedirectConfig"] == {
            "Protocol": "HTTPS",
            "Port": "443",
            "StatusCode": "HTTP_301",
        }


class TestUpdates:
    def test_queue_redelivers_as_the_gateway_expects(self, bare: Stack) -> None:
        queue = bare.resources["UpdatesQueue"]
        assert queue["QueueName"] == "agenticai-updates-prod.fifo"
        assert queue["FifoQueue"] is True
        assert queue["ContentBasedDeduplication"] is False
        assert queue["VisibilityTimeout"] == server.Intake.VISIBILITY_S
        assert queue["RedrivePolicy"] == {
            "deadLetterTargetArn": "<UpdatesDeadLetterQueue.Arn>",
            "maxReceiveCount": server.Intake.RECEIVES,
        }

    def test_dead_letters_are_kept_longest(self, bare: Stack) -> None:
        dead = bare.resources["UpdatesDeadLetterQueue"]
        assert dead["FifoQueue"] is True  # a FIFO queue's dead letters need one
        assert dead["MessageRetentionPeriod"] == 14 * 86_400
        assert (
            dead["MessageRetentionPeriod"]
            > bare.resources["UpdatesQueue"]["MessageRetentionPeriod"]
        )

    def test_everything_at_rest_is_encrypted(self, full: Stack) -> None:
        for name in of_type("AWS::SQS::Queue"):
            assert full.resources[name]["SqsManagedSseEnabled"] is True
        assert full.resources["UpdatesTopic"]["KmsMasterKeyId"] == "alias/aws/sns"
        # DynamoDB, ECR and CloudWatch Logs always encrypt; nothing here switches to another key.
        assert "SSESpecification" not in full.resources["EventsTable"]
        assert "EncryptionConfiguration" not in full.resources["WebSocketRepository"]

    def test_plain_http_is_refused(self, bare: Stack) -> None:
        queues = bare.resources["UpdatesQueuePolicy"]
        assert queues["Queues"] == ["<UpdatesQueue>", "<UpdatesDeadLetterQueue>"]
        topic = bare.resources["UpdatesTopicPolicy"]
        assert topic["Topics"] == ["<UpdatesTopic>"]
        for policy in (queues, topic):
            (statement,) = policy["PolicyDocument"]["Statement"]
            assert statement["Effect"] == "Deny"
            assert statement["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}

    def test_fan_out_queues_are_named_after_the_whole_topic(self) -> None:
        """server.py cuts a topic's name at 40 letters, which the task role's pattern does not."""
        topic = Stack(Environment="a" * 12).resources["UpdatesTopic"]["TopicName"]
        assert len(topic) <= 40

    def test_events_table(self, moto_stack: MotoStack) -> None:
        moto_stack.deploy()
        dynamodb = boto3.client("dynamodb")
        table = dynamodb.describe_table(TableName="agenticai-events-prod")["Table"]
        assert table["KeySchema"] == [
            {"AttributeName": "PK", "KeyType": "HASH"},
            {"AttributeName": "SK", "KeyType": "RANGE"},
        ]
        assert table["BillingModeSummary"]["BillingMode"] == "PAY_PER_REQUEST"
        properties = RESOURCES["EventsTable"]["Properties"]  # moto leaves these two out
        assert properties["TimeToLiveSpecification"] == {
            "AttributeName": "expires_at",
            "Enabled": True,
        }
        assert properties["PointInTimeRecoverySpecification"] == {
            "PointInTimeRecoveryEnabled": True
        }


class TestImageAndLogs:
    def test_repository(self, bare: Stack) -> None:
        repository = bare.resources["WebSocketRepository"]
        assert repository["ImageScanningConfiguration"] == {"ScanOnPush": True}
        assert repository["ImageTagMutability"] == "IMMUTABLE"
        rules = json.loads(repository["LifecyclePolicy"]["LifecyclePolicyText"])["rules"]
        assert all(rule["action"] == {"type": "expire"} for rule in rules)
        assert [rule["selection"]["countNumber"] for rule in rules] == [20, 20]

    def test_failed_builds_do_not_push_the_running_image_out(self, bare: Stack) -> None:
        """What matches the first rule, by the tag of an image that ran, the second leaves alone."""
        repository = bare.resources["WebSocketRepository"]
        ran, every = json.loads(repository["LifecyclePolicy"]["LifecyclePolicyText"])["rules"]
        assert ran["rulePriority"] < every["rulePriority"]
        assert ran["selection"]["tagPrefixList"] == ["deployed-"]

    def test_log_group_forgets(self, bare: Stack) -> None:
        group = bare.resources["LogGroup"]
        assert group["LogGroupName"] == "/ecs/agenticai-websocket-prod"
        assert int(group["RetentionInDays"]) == 14


class TestRoles:
    def test_task_role_allows_exactly_the_calls_of_the_server(self, full: Stack) -> None:
        """The role's actions are those of the AWS operations that server.py names, no more."""
        granted: set[str] = set()
        for statement in full.statements("TaskRole").values():
            actions = statement["Action"]
            granted |= {actions} if isinstance(actions, str) else set(actions)
        needed = {action for call in calls_in_server() for action in iam_actions(*call)}
        assert granted == needed

    def test_task_role_names_its_resources(self, full: Stack) -> None:
        """A star stands only where an action has no resource type."""
        sqs = "arn:aws:sqs:us-east-1:123456789012:"
        resources = {sid: s["Resource"] for sid, s in full.statements("TaskRole").items()}
        assert resources == {
            "ForwardToAgents": [f"{sqs}agenticai-{agent}" for agent in ("PM", "Dev", "QA", "Ops")],
            "ReceiveUpdates": "<UpdatesQueue.Arn>",
            "OwnQueue": f"{sqs}agenticai-updates-prod-task-*",
            "FindQueuesOfKilledTasks": "*",
            "FanOut": "<UpdatesTopic>",
            "SubscribeOwnQueue": "<UpdatesTopic>",
            "EndSubscriptions": "*",
            "ReadProjects": "arn:aws:dynamodb:us-east-1:123456789012:table/agenticai-data",
            "KeepEventLog": "<EventsTable.Arn>",
            "OwnTargetHealth": "*",
        }

    def test_agents_queue_may_be_fifo(self) -> None:
        url = "https://sqs.us-east-1.amazonaws.com/123456789012/plans.fifo"
        assert accepts(PARAMETERS["PMQueueUrl"], url)
        statement = Stack(PMQueueUrl=url).statements("TaskRole")["ForwardToAgents"]
        assert statement["Resource"][0] == "arn:aws:sqs:us-east-1:123456789012:plans.fifo"

    def test_task_subscribes_only_its_kind_of_queue(self, full: Stack) -> None:
        condition = full.statements("TaskRole")["SubscribeOwnQueue"]["Condition"]
        assert condition == {
            "StringEquals": {"sns:Protocol": "sqs"},
            "StringLike": {
                "sns:Endpoint": "arn:aws:sqs:us-east-1:123456789012:agenticai-updates-prod-task-*"
            },
        }

    def test_own_queue_of_one_environment_is_not_anothers(self) -> None:
        """No environment's name lets its wildcard reach the queues of another."""
        assert not accepts(PARAMETERS["Environment"], "prod-task-x")

    def test_execution_role_pulls_one_image_and_writes_one_log(self, full: Stack) -> None:
        statements = full.statements("ExecutionRole")
        assert {sid: s["Resource"] for sid, s in statements.items()} == {
            "SignInToEcr": "*",
            "PullTheImage": "<WebSocketRepository.Arn>",
            "WriteTheLog": "<LogGroup.Arn>",
        }

    def test_customer_keys_by_parameter(self, full: Stack) -> None:
        """The keys of the platform's queues and table, through SQS and DynamoDB alone."""
        assert "UseCustomerKeys" not in full.statements("TaskRole")
        keys = [f"arn:aws:kms:us-east-1:123456789012:key/{number}" for number in (1, 2)]
        statement = Stack(KmsKeyArns=",".join(keys)).statements("TaskRole")["UseCustomerKeys"]
        assert statement["Resource"] == keys
        assert statement["Condition"]["StringEquals"]["kms:ViaService"] == [
            "sqs.us-east-1.amazonaws.com",
            "dynamodb.us-east-1.amazonaws.com",
        ]

    @pytest.mark.parametrize("role", ["TaskRole", "ExecutionRole"])
    def test_only_tasks_of_this_account_may_be_it(self, full: Stack, role: str) -> None:
        (statement,) = full.resources[role]["AssumeRolePolicyDocument"]["Statement"]
        assert statement["Principal"] == {"Service": "ecs-tasks.amazonaws.com"}
        tasks = "arn:aws:ecs:us-east-1:123456789012:*"
        assert statement["Condition"] == {"ArnLike": {"aws:SourceArn": tasks}}

    @pytest.mark.parametrize("role", ["TaskRole", "ExecutionRole"])
    def test_statements_have_a_sid_and_no_wildcard_action(self, full: Stack, role: str) -> None:
        for policy in full.resources[role]["Policies"]:
            for statement in policy["PolicyDocument"]["Statement"]:
                assert re.fullmatch(r"[A-Z][A-Za-z]+", statement["Sid"])
                assert "*" not in json.dumps(statement["Action"])


def calls_in_server() -> set[tuple[str, str]]:
    """(service, operation) of all calls in server.py, also those of a paginator."""
    session = botocore.session.get_session()
    operations = {
        xform_name(operation): (service, operation)
        for service in ("sqs", "sns", "dynamodb", "elbv2")
        for operation in session.get_service_model(service).operation_names
    }
    tree = ast.parse((ROOT / "server.py").read_text("utf-8"))
    used: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(attr="get_paginator"), args=[ast.Constant(str(name))]):
                used.add(name)
            case ast.Attribute(attr=name):
                used.add(name)
    return {operations[name] for name in used & operations.keys()}


class TestService:
    KEYS: ClassVar = {
        "AuthJwksUrl": "https://issuer.example.com/keys.json",
        "AuthIssuer": "https://issuer.example.com",
        "AuthAudience": "gateway",
    }

    @pytest.fixture
    def container(self, full: Stack) -> dict[str, Any]:
        (container,) = full.resources["TaskDefinition"]["ContainerDefinitions"]
        return cast("dict[str, Any]", container)

    def test_names(self, full: Stack) -> None:
        assert full.resources["Cluster"]["ClusterName"] == "agenticai-cluster-prod"
        assert full.resources["Service"]["ServiceName"] == "agenticai-websocket-prod"

    def test_size_and_processor(self, full: Stack) -> None:
        task = full.resources["TaskDefinition"]
        assert (task["Cpu"], task["Memory"]) == ("256", "512")
        assert task["RuntimePlatform"]["CpuArchitecture"] == "X86_64"
        arm = Stack(ContainerImage=IMAGE, CpuArchitecture="ARM64").resources["TaskDefinition"]
        assert arm["RuntimePlatform"]["CpuArchitecture"] == "ARM64"

    def test_container_is_confined(self, container: dict[str, Any]) -> None:
        assert container["Image"] == IMAGE
        assert container["ReadonlyRootFilesystem"] is True
        assert container["LinuxParameters"]["Capabilities"] == {"Drop": ["ALL"]}
        assert container["StopTimeout"] == 120
        assert "Privileged" not in container

    def test_log_never_blocks_the_server(self, container: dict[str, Any]) -> None:
        assert container["LogConfiguration"]["Options"]["mode"] == "non-blocking"

    @pytest.mark.parametrize(("status", "exit_code"), [(200, 0), (503, 1), (None, 1)])
    def test_container_check(
        self, container: dict[str, Any], status: int | None, exit_code: int
    ) -> None:
        """The check's own command passes on 200 from /live, and fails on 503 or no answer."""
        kind, interpreter, option, program = container["HealthCheck"]["Command"]
        assert (kind, interpreter, option) == ("CMD", "python", "-c")
        asked: list[str] = []

        class Live(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                self.send_response(status or 500)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        with http.server.HTTPServer(("127.0.0.1", 0), Live) as answering:
            port = str(answering.server_address[1])
            assert "8080" in program
            if status is not None:
                threading.Thread(target=answering.serve_forever, daemon=True).start()
            else:
                answering.server_close()
            done = subprocess.run(
                [sys.executable, option, program.replace("8080", port)],
                capture_output=True,
                timeout=30,
                check=False,
            )
            if status is not None:
                answering.shutdown()
        assert done.returncode == exit_code
        assert asked == (["/live"] if status is not None else [])

    def test_server_accepts_the_environment(self, full: Stack) -> None:
        """server.py starts with what the container gets, every parameter at its default."""
        environment = realistic(full.container_environment())
        settings = server.Settings.from_mapping(environment)
        assert settings.environment == "prod"
        assert settings.websocket_port == 8080
        assert settings.drain_seconds == 30

    @pytest.mark.parametrize(
        "name", [name for name, p in PARAMETERS.items() if "MaxValue" in p or "AllowedValues" in p]
    )
    def test_server_accepts_the_extremes(self, name: str) -> None:
        """What a parameter allows, the setting it becomes allows too."""
        parameter = PARAMETERS[name]
        extremes = parameter.get("AllowedValues") or [parameter["MinValue"], parameter["MaxValue"]]
        for value in map(str, extremes):
            stack = Stack(ContainerImage=IMAGE, **self.KEYS, **{name: value})
            assert rules_hold(Stack(**self.KEYS, **{name: value})) or name.startswith("Task")
            server.Settings.from_mapping(realistic(stack.container_environment()))

    @pytest.mark.parametrize("name", PATTERNS)
    @given(data=st.data())
    def test_server_accepts_what_a_pattern_does(
        self, whole: dict[str, str], name: str, data: st.DataObject
    ) -> None:
        """No text that CloudFormation takes ends the container with exit code 2."""
        pattern = re.compile(PARAMETERS[name]["AllowedPattern"], re.ASCII)  # as in Java
        value = data.draw(st.from_regex(pattern, fullmatch=True))
        assert value or "Default" in PARAMETERS[name]
        # What is needed with keys, and nothing without them, a rule says.
        if value or name not in self.KEYS:
            server.Settings.from_mapping({**whole, VARIABLES[name]: value})

    @pytest.mark.parametrize("name", PATTERNS)
    def test_server_accepts_every_number_a_pattern_does(
        self, whole: dict[str, str], name: str
    ) -> None:
        """The highest ones above all, which random text hardly ever is."""
        powers = {10**digits + more for digits in range(9) for more in (-1, 0, 1)}
        accepted = [n for n in {*range(1_100), *powers} if accepts(PARAMETERS[name], str(n))]
        assert accepted or not name.startswith("Max")
        for number in accepted:
            server.Settings.from_mapping({**whole, VARIABLES[name]: str(number)})

    @pytest.mark.parametrize("name", PATTERNS)
    def test_default_of_the_setting_can_be_given(self, name: str) -> None:
        """What the documents name as the default is no worse than leaving it out."""
        default = server.Settings.__dataclass_fields__[VARIABLES[name].lower()].default
        required = default is dataclasses.MISSING
        assert required or accepts(PARAMETERS[name], shown(default).strip("`"))

    def test_every_variable_is_a_setting(self, full: Stack) -> None:
        """A name that server.py does not read would promise what it does not do."""
        settings = {name.upper() for name in server.Settings.__dataclass_fields__}
        assert full.container_environment().keys() <= settings

    def test_every_limit_and_check_is_a_parameter(self, full: Stack) -> None:
        """What keeps strangers and floods out can be set without touching the template."""
        settings = {name.upper() for name in server.Settings.__dataclass_fields__}
        guards = {n for n in settings if re.match("AUTH_|ALLOWED_|TRUSTED_", n) or "_PER_" in n}
        assert guards | {"MAX_CONNECTIONS"} <= full.container_environment().keys()

    def test_server_authenticates_as_told(self) -> None:
        stack = Stack(
            ContainerImage=IMAGE,
            AuthJwksUrl="https://issuer.example.com/keys.json",
            AuthIssuer="https://issuer.example.com",
            AuthAudience="gateway",
            AuthAlgorithms="ES256,EdDSA",
            AuthFirstMessage="on",
            AllowedOrigins="https://app.example.com,https://admin.example.com",
            MaxConnectionsPerIp="7",
        )
        assert rules_hold(stack)
        settings = server.Settings.from_mapping(realistic(stack.container_environment()))
        assert settings.auth_jwks_url == "https://issuer.example.com/keys.json"
        assert settings.auth_algorithms == ("ES256", "EdDSA")
        assert settings.auth_first_message is True
        assert settings.allowed_origins == ("https://app.example.com", "https://admin.example.com")
        assert settings.max_connections_per_ip == 7

    def test_auto_scaling_owns_the_count(self, full: Stack) -> None:
        assert "DesiredCount" not in full.resources["Service"]

    def test_failed_rollout_rolls_back(self, full: Stack) -> None:
        deployment = full.resources["Service"]["DeploymentConfiguration"]
        assert deployment["DeploymentCircuitBreaker"] == {"Enable": True, "Rollback": True}
        assert deployment["MinimumHealthyPercent"] == 100
        assert deployment["MaximumPercent"] == 200

    def test_service_waits_for_the_listener_that_forwards(self, full: Stack) -> None:
        """A reference, as DependsOn cannot name a listener that may not exist."""
        plain = Stack(ContainerImage=IMAGE).resources
        assert plain["Service"]["Tags"] == [{"Key": "listener", "Value": "<HttpListener>"}]
        assert full.resources["Service"]["Tags"] == [
            {"Key": "listener", "Value": "<HttpsListener>"}
        ]
        for resources, listener in ((plain, "HttpListener"), (full.resources, "HttpsListener")):
            assert resources[listener]["DefaultActions"][0]["Type"] == "forward"

    def test_container_is_the_one_behind_the_load_balancer(
        self, full: Stack, container: dict[str, Any]
    ) -> None:
        assert full.resources["Service"]["LoadBalancers"] == [
            {
                "ContainerName": container["Name"],
                "ContainerPort": container["PortMappings"][0]["ContainerPort"],
                "TargetGroupArn": "<TargetGroup>",
            }
        ]

    def test_public_address_by_parameter(self) -> None:
        for choice in ("ENABLED", "DISABLED"):
            service = Stack(ContainerImage=IMAGE, AssignPublicIp=choice).resources["Service"]
            network = service["NetworkConfiguration"]["AwsvpcConfiguration"]
            assert network["AssignPublicIp"] == choice
            assert network["SecurityGroups"] == ["<TaskSecurityGroup>"]


def realistic(environment: dict[str, str]) -> dict[str, str]:
    """The container's variables with what a reference to a queue or topic really gives."""
    values = {
        "<UpdatesQueue>": "https://sqs.us-east-1.amazonaws.com/123456789012/agenticai-updates-prod.fifo",
        "<UpdatesTopic>": "arn:aws:sns:us-east-1:123456789012:agenticai-updates-prod",
        "<TargetGroup>": "arn:aws:elasticloadbalancing:us-east-1:123456789012"
        ":targetgroup/agenticai-tg-prod/0123456789abcdef",
        "<EventsTable>": "agenticai-events-prod",
    }
    return {name: values.get(value, value) for name, value in environment.items()}


WATCHES = {
    "UnhealthyTargetsAlarm": "TargetGroup",
    "OldestUpdateAlarm": "UpdatesQueue",
    "DeadLetterAlarm": "UpdatesDeadLetterQueue",
    "ForwardErrorsAlarm": "LogGroup",
    "MemoryClosedAlarm": "LogGroup",
    "HighCpuAlarm": "Service",
    "HighMemoryAlarm": "Service",
}


class TestAlarms:
    def test_each_stands_below_what_it_watches(self) -> None:
        above = ""
        found: dict[str, str] = {}
        for name, resource in RESOURCES.items():
            if resource["Type"] == "AWS::CloudWatch::Alarm":
                found[name] = above
            else:
                above = name
        assert found == WATCHES

    @pytest.mark.parametrize(
        ("name", "metric", "threshold", "seconds"),
        [
            ("UnhealthyTargetsAlarm", "UnHealthyHostCount", 0, 180),
            ("OldestUpdateAlarm", "ApproximateAgeOfOldestMessage", 60, 180),
            ("DeadLetterAlarm", "ApproximateNumberOfMessagesVisible", 0, 60),
            ("ForwardErrorsAlarm", "ForwardErrors", 10, 300),
            ("MemoryClosedAlarm", "MemoryClosed", 0, 300),
            ("HighCpuAlarm", "CPUUtilization", 80, 300),
            ("HighMemoryAlarm", "MemoryUtilization", 80, 300),
        ],
    )
    def test_threshold(
        self, full: Stack, name: str, metric: str, threshold: int, seconds: int
    ) -> None:
        alarm = full.resources[name]
        assert alarm["MetricName"] == metric
        assert alarm["Threshold"] == threshold
        assert alarm["ComparisonOperator"] == "GreaterThanThreshold"
        assert alarm["Period"] * alarm["EvaluationPeriods"] == seconds

    @pytest.mark.parametrize("name", WATCHES)
    def test_tells_what_to_do(self, full: Stack, name: str) -> None:
        """A sentence for who is woken by it, a decision on missing data, and a way to be told."""
        alarm = full.resources[name]
        assert len(alarm["AlarmDescription"].split()) >= 20
        assert alarm["TreatMissingData"] in ("breaching", "notBreaching")
        assert alarm["AlarmActions"] == alarm["OKActions"] == ["<AlarmTopic>"]

    def test_without_an_address_nobody_is_subscribed(self) -> None:
        """The topic is there all the same, for a chat or a pager of the operator's own."""
        stack = Stack(ContainerImage=IMAGE)
        assert "AlarmTopic" in stack.resources
        assert "AlarmSubscription" not in stack.resources

    def test_first_deployment_does_not_ring(self) -> None:
        """An alarm that a missing target rings is made when the service has targets."""
        assert RESOURCES["UnhealthyTargetsAlarm"]["DependsOn"] == "Service"

    def test_address_is_subscribed(self, full: Stack) -> None:
        assert full.resources["AlarmSubscription"] == {
            "TopicArn": "<AlarmTopic>",
            "Protocol": "email",
            "Endpoint": "oncall@example.com",
        }

    def test_alarms_on_the_service_come_with_it(self, bare: Stack) -> None:
        alarms = {name for name in bare.resources if name in WATCHES}
        assert alarms == {
            "OldestUpdateAlarm",
            "DeadLetterAlarm",
            "ForwardErrorsAlarm",
            "MemoryClosedAlarm",
        }


class TestScaling:
    def test_one_to_four_tasks(self, full: Stack) -> None:
        target = full.resources["ScalableTarget"]
        assert (int(target["MinCapacity"]), int(target["MaxCapacity"])) == (1, 4)
        assert target["ResourceId"] == "service/<Cluster>/<Service.Name>"

    def test_aims_at_cpu(self, full: Stack) -> None:
        policy = full.resources["CpuScaling"]["TargetTrackingScalingPolicyConfiguration"]
        assert policy["TargetValue"] == 70
        assert policy["PredefinedMetricSpecification"] == {
            "PredefinedMetricType": "ECSServiceAverageCPUUtilization"
        }

    def test_aims_at_connections(self, full: Stack) -> None:
        policy = full.resources["ConnectionScaling"]["TargetTrackingScalingPolicyConfiguration"]
        assert int(policy["TargetValue"]) == 2000
        metric = policy["CustomizedMetricSpecification"]
        assert metric["MetricName"] == "ActiveConnections"
        assert metric["Statistic"] == "Average"

    def test_full_task_is_within_its_memory(self, full: Stack) -> None:
        """At the target, connections at 6 KB each leave most of the task's memory free."""
        connections = int(full.parameters["ConnectionsPerTask"])
        assert connections * 6 * 1024 < 0.1 * int(full.parameters["TaskMemory"]) * 1024**2


def dimensions(metric: dict[str, Any]) -> dict[str, str]:
    return {dimension["Name"]: dimension["Value"] for dimension in metric["Dimensions"]}


class TestMetrics:
    """Names of the gateway's own metrics: nothing in AWS would say that one is misspelt."""

    def test_every_metric_is_one_the_server_writes(self, full: Stack) -> None:
        used = {name for namespace, name, *_ in dashboard_metrics(full) if namespace == NAMESPACE}
        used |= {
            alarm["MetricName"]
            for name, alarm in full.resources.items()
            if name in WATCHES and alarm["Namespace"] == NAMESPACE
        }
        assert "ForwardErrors" in used
        assert used <= server.Metrics.described().keys()

    def test_dimensions_are_those_of_the_servers_line(self, full: Stack) -> None:
        line = server.Metrics("prod", server.Registry()).line()
        (definition,) = line["_aws"]["CloudWatchMetrics"]
        assert definition["Namespace"] == NAMESPACE
        written = {name: line[name] for name in definition["Dimensions"][0]}
        scaling = full.resources["ConnectionScaling"]["TargetTrackingScalingPolicyConfiguration"]
        assert dimensions(scaling["CustomizedMetricSpecification"]) == written
        assert dimensions(full.resources["ForwardErrorsAlarm"]) == written
        for namespace, _, *pairs in dashboard_metrics(full):
            if namespace == NAMESPACE:
                assert dict(zip(pairs[::2], pairs[1::2], strict=True)) == written


class TestDashboard:
    def test_shows_what_is_asked_first(self, full: Stack) -> None:
        shown = {metric for _, metric, *_ in dashboard_metrics(full)}
        assert shown >= {
            "ActiveConnections",
            "MessagesForwarded",
            "ForwardLatency",
            "EventsDelivered",
            "EventLatency",
            "ForwardErrors",
            "ProtocolErrors",
            "CPUUtilization",
            "MemoryUtilization",
            "ApproximateNumberOfMessagesVisible",
        }

    def test_widgets_fill_their_rows(self, full: Stack) -> None:
        """CloudWatch places widgets one after the other, on a grid 24 wide."""
        widths = [widget["width"] for widget in dashboard(full)["widgets"]]
        assert sum(widths) % 24 == 0
        assert set(widths) == {8}

    def test_names_the_stacks_own_parts(self, full: Stack) -> None:
        metrics = dashboard_metrics(full)
        queues = {m[3] for m in metrics if m[0] == "AWS/SQS"}
        assert queues == {
            "agenticai-updates-prod.fifo",
            "agenticai-updates-dlq-prod.fifo",
            *(f"agenticai-{agent}" for agent in ("PM", "Dev", "QA", "Ops")),
        }
        (cpu,) = (m for m in metrics if m[1] == "CPUUtilization")
        cluster, service = full.resources["Cluster"], full.resources["Service"]
        assert cpu[2:] == [
            "ClusterName",
            cluster["ClusterName"],
            "ServiceName",
            service["ServiceName"],
        ]

    def test_output_leads_to_it(self, full: Stack) -> None:
        name = full.resources["Dashboard"]["DashboardName"]
        assert full.outputs["DashboardUrl"].endswith(f"/dashboard/{name}")


def dashboard(stack: Stack) -> dict[str, Any]:
    return cast("dict[str, Any]", json.loads(stack.resources["Dashboard"]["DashboardBody"]))


def dashboard_metrics(stack: Stack) -> list[list[str]]:
    """The metrics of every widget: CloudWatch's abbreviations written out, options left out."""
    found: list[list[str]] = []
    for widget in dashboard(stack)["widgets"]:
        above: list[str] = []
        for row in widget["properties"]["metrics"]:
            words = [word for word in row if isinstance(word, str)]
            if words[0] == "...":  # all of the row above but its last words
                words = above[: len(above) - len(words) + 1] + words[1:]
            words = [above[i] if word == "." else word for i, word in enumerate(words)]
            found.append(words)
            above = words
    return found
