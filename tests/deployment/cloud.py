"""An AWS that deploys: CloudFormation, and what a deployment asks of ECS, ECR, ELB and others.

What runs on it - queues, topic, tables - is the moto of ``tests.moto_aws``; requests for it are
passed on. Stacks go through their states in time, keep events with the token of their operation,
and are refused what CloudFormation refuses: states, sizes, capabilities, parameters, rules.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import http.client
import http.server
import json
import re
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from types import TracebackType
from typing import Any

from botocore import xform_name
from moto.core.parse import PROTOCOL_PARSERS
from moto.core.serialize import get_serializer_class
from moto.core.utils import get_service_model
from werkzeug.datastructures import Headers, MultiDict

from tests import template
from tests.issuer import key_set, public_jwk
from tests.moto_aws import ACCESS_KEY, MotoAws

ACCOUNT = "123456789012"
REGION = "us-east-1"
REGISTRY = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com"
VPC = "vpc-0123456789abcdef0"
SUBNETS = ("subnet-0123456789abcdef0", "subnet-0fedcba9876543210")
CERTIFICATE = f"arn:aws:acm:{REGION}:{ACCOUNT}:certificate/1234abcd"
MAIN_STACK, GATEWAY_STACK = "agenticai-stack", "agenticai-websocket-stack"
TEMPLATE_BYTES = 51_200
QUEUE_NAME_REST_S = 60.0  # a deleted queue's name cannot be used again for so long
HEALTHY_WITHIN_S = 90.0  # many times what a task needs on a machine that is not busy
NO_CHANGES = (
    "The submitted information didn't contain changes. "
    "Submit different information to create a change set."
)

SERVICES = {  # name in the signature: name of the model
    "cloudformation": "cloudformation",
    "ecs": "ecs",
    "ecr": "ecr",
    "elasticloadbalancing": "elbv2",
    "application-autoscaling": "application-autoscaling",
    "ec2": "ec2",
    "acm": "acm",
    "logs": "logs",
    "sts": "sts",
}

Json = dict[str, Any]


class AwsError(Exception):
    """What a service answers instead of a result."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def invalid(message: str) -> AwsError:
    return AwsError("ValidationError", message)


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


@dataclass(frozen=True)
class Call:
    """A request the simulated AWS was sent."""

    service: str
    operation: str
    parameters: Json
    access_key: str

    @property
    def action(self) -> str:
        """The IAM action that allows it."""
        prefix = "elasticloadbalancing" if self.service == "elbv2" else self.service
        return f"{prefix}:{self.operation}"

    @property
    def changes(self) -> bool:
        """Whether it asked for anything to be changed."""
        return not re.match("Describe|Get|List|BatchGet|Filter", self.operation)


@dataclass
class Fault:
    """What an operation answers instead, so many times."""

    error: AwsError
    times: int = 1


@dataclass
class ChangeSet:
    name: str
    arn: str
    kind: str
    status: str
    reason: str
    parameters: dict[str, str]
    body: str
    changes: list[Json]


@dataclass
class StackRecord:
    """A stack: what DescribeStacks says of it, and what it is made of."""

    name: str
    arn: str
    status: str
    reason: str = ""
    parameters: dict[str, str] = field(default_factory=dict)
    body: str = ""
    outputs: dict[str, str] = field(default_factory=dict)
    events: list[Json] = field(default_factory=list)
    """Oldest first."""
    change_sets: dict[str, ChangeSet] = field(default_factory=dict)
    resources: set[str] = field(default_factory=set)
    deleted_at: datetime.datetime | None = None


@dataclass
class Image:
    digest: str
    folder: Path
    tags: list[str]
    pushed_at: float


@dataclass
class Task:
    """A ``server.py`` of an image, started with the environment of its task definition."""

    id: str
    process: subprocess.Popen[str]
    log: list[str] = field(default_factory=list)
    port: int = 0
    stopped_reason: str = ""
    stopped_at: datetime.datetime | None = None

    def health(self) -> int:
        """The status of ``GET /health``; 0 where nobody answers."""
        if not self.port:
            return 0
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/health", headers={"User-Agent": "ELB-HealthChecker/2.0"})
            return connection.getresponse().status
        except OSError:
            return 0
        finally:
            connection.close()


@dataclass
class Service:
    name: str
    cluster: str
    image: str
    tasks: list[Task] = field(default_factory=list)
    stopped: list[Task] = field(default_factory=list)
    rollout: str = "IN_PROGRESS"
    events: list[str] = field(default_factory=list)


class Evaluated(template.Stack):
    """A template as it was sent, with names and ARNs as this AWS gives them."""

    def __init__(self, cloud: Cloud, body: str, parameters: Mapping[str, str]) -> None:
        self._cloud = cloud
        super().__init__(template.parse(body), **parameters)

    def _ref(self, name: str) -> Any:
        resource = self._template["Resources"].get(name)
        if resource is None or not self._exists(resource):
            return super()._ref(name)
        properties = resource.get("Properties", {})
        match resource["Type"]:
            case "AWS::SQS::Queue":
                queue = self(properties["QueueName"])
                return f"https://sqs.{REGION}.amazonaws.com/{ACCOUNT}/{queue}"
            case "AWS::SNS::Topic":
                return f"arn:aws:sns:{REGION}:{ACCOUNT}:{self(properties['TopicName'])}"
            case "AWS::DynamoDB::Table":
                return self(properties["TableName"])
            case "AWS::ECS::Cluster":
                return self(properties["ClusterName"])
            case "AWS::ElasticLoadBalancingV2::TargetGroup":
                named = f"targetgroup/{self(properties['Name'])}/0123456789abcdef"
                return f"arn:aws:elasticloadbalancing:{REGION}:{ACCOUNT}:{named}"
            case "AWS::ECS::TaskDefinition":
                text = json.dumps(self(properties), sort_keys=True)
                return f"task-definition/{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        return super()._ref(name)

    def _attribute(self, name: str, attribute: str) -> str:
        resource = self._template["Resources"][name]
        properties = resource.get("Properties", {})
        match resource["Type"], attribute:
            case "AWS::ElasticLoadBalancingV2::LoadBalancer", "DNSName":
                return self._cloud.balancer.address
            case "AWS::ECR::Repository", "RepositoryUri":
                return f"{REGISTRY}/{self(properties['RepositoryName'])}"
            case "AWS::ECS::Service", "Name":
                return str(self(properties["ServiceName"]))
            case "AWS::SQS::Queue", "Arn":
                return _queue_arn(self(properties["QueueName"]))
        return super()._attribute(name, attribute)


def _queue_arn(name: str) -> str:
    return f"arn:aws:sqs:{REGION}:{ACCOUNT}:{name}"


REPLACED_BY = {
    "AWS::ECS::TaskDefinition": {"ContainerDefinitions", "Cpu", "Memory", "RuntimePlatform"},
    "AWS::ElasticLoadBalancingV2::TargetGroup": {"Name", "VpcId", "Port", "TargetType"},
    "AWS::ElasticLoadBalancingV2::LoadBalancer": {"Name", "Scheme"},
    "AWS::EC2::SecurityGroup": {"VpcId", "GroupDescription"},
    "AWS::SQS::Queue": {"QueueName", "FifoQueue"},
    "AWS::DynamoDB::Table": {"TableName", "KeySchema"},
}
"""Properties whose change makes CloudFormation replace a resource."""


def as_list(values: Mapping[str, str], kind: str) -> list[Json]:
    """A mapping as CloudFormation writes it: OutputKey and OutputValue, and so on."""
    return [{f"{kind}Key": key, f"{kind}Value": value} for key, value in values.items()]


class Balancer(socketserver.ThreadingTCPServer):
    """The load balancer: passes each connection on to the newest healthy task."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, cloud: Cloud) -> None:
        balancer = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                port = balancer.port_of_a_task()
                if not port:
                    self.request.sendall(
                        b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"
                    )
                    return
                with socket.create_connection(("127.0.0.1", port)) as task:
                    back = threading.Thread(target=_pump, args=(task, self.request), daemon=True)
                    back.start()
                    _pump(self.request, task)
                    back.join(10)

        self._cloud = cloud
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server_address[1]}"

    def port_of_a_task(self) -> int:
        tasks = [task for service in self._cloud.services.values() for task in service.tasks]
        return next((task.port for task in reversed(tasks) if task.health() == 200), 0)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that is cut is no matter for the test's output."""


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65_536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


class Cloud:
    """The whole of it. Use as a context manager; ``endpoint_url`` is where the AWS CLI goes."""

    def __init__(self, aws: MotoAws, folder: Path) -> None:
        self.aws = aws
        self.folder = folder
        self.lock = threading.RLock()
        self.calls: list[Call] = []
        self.faults: dict[str, Fault] = {}
        """By operation: what it answers the next times."""
        self.latency_s: dict[str, float] = {}
        self.resource_s = 0.0
        """How long a resource of a stack takes."""
        self.failing: dict[str, str] = {}
        """Logical id of a resource that cannot be made, and why; taken out once it has failed."""
        self.stuck: set[str] = set()
        """Operations that end badly as well: ``rollback``, ``delete``. Taken out once."""
        self.validation: list[str] = []
        """Reasons for which the next change set fails early."""
        self.stacks: list[StackRecord] = []
        """Also deleted ones, oldest first."""
        self.repositories: dict[str, list[Image]] = {}
        self.services: dict[str, Service] = {}
        self.logins: set[str] = set()
        self.vpcs: list[Json] = [{"VpcId": VPC, "IsDefault": True, "CidrBlock": "172.31.0.0/16"}]
        self.certificate: Json = {
            "CertificateArn": CERTIFICATE,
            "DomainName": "ws.example.com",
            "SubjectAlternativeNames": ["ws.example.com"],
            "Status": "ISSUED",
        }
        self._deleted_queues: dict[str, float] = {}
        self._threads: list[threading.Thread] = []
        self.balancer = Balancer(self)
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.endpoint_url = f"http://127.0.0.1:{self._server.server_port}"
        for server in (self.balancer, self._server):
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> Cloud:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for service in self.services.values():
            for task in service.tasks:
                task.process.kill()
        for thread in self._threads:
            thread.join(HEALTHY_WITHIN_S)
        for service in self.services.values():
            for task in service.tasks:
                task.process.kill()
                task.process.wait()
        for server in (self.balancer, self._server):
            server.shutdown()
            server.server_close()

    # --- HTTP -------------------------------------------------------------------------------

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        cloud = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.do_POST()

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, headers, answer = cloud.answer(self.command, self.path, self.headers, body)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                pass

        return Handler

    def answer(
        self, method: str, path: str, headers: Message, body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for one request."""
        if path == "/keys.json":
            return 200, {"Content-Type": "application/json"}, key_set(public_jwk("key-1"))
        if path.startswith("/docker/"):
            return self._docker(path.removeprefix("/docker/"), json.loads(body))
        credential = re.search(
            r"Credential=([^/]+)/[^/]+/[^/]+/([^/]+)/", headers.get("Authorization", "")
        )
        access_key, signed = credential.groups() if credential else ("", "")
        if signed not in SERVICES:
            return self._pass_on(method, path, headers, body)
        model = get_service_model(SERVICES[signed])
        values = MultiDict(urllib.parse.parse_qsl(body.decode(), keep_blank_values=True))
        target = headers.get("X-Amz-Target", "").rpartition(".")[2]
        operation = model.operation_model(target or values["Action"])
        parse = PROTOCOL_PARSERS[model.protocol](operation)
        request: Any = {
            "body": body,
            "headers": Headers(),
            "method": method,
            "url_params": {},
            "url_path": path,
            "values": values,
        }
        parameters = parse.parse(request)
        call = Call(SERVICES[signed], operation.name, parameters, access_key)
        result: Any
        try:
            result = self._perform(call)
        except AwsError as exc:
            result = exc
        serializer = get_serializer_class(call.service, model.protocol)(operation)
        answer = serializer.serialize(result)
        text = answer["body"]
        return (
            int(answer["status_code"]),
            {name: str(value) for name, value in answer["headers"].items()},
            text.encode() if isinstance(text, str) else bytes(text),
        )

    def _perform(self, call: Call) -> Any:
        with self.lock:
            self.calls.append(call)
            fault = self.faults.get(call.operation)
            if fault and fault.times > 0:
                fault.times -= 1
                raise fault.error
        time.sleep(self.latency_s.get(call.operation, 0))
        handler: Callable[[Json], Any] | None = getattr(
            self, f"{call.service.replace('-', '_')}_{xform_name(call.operation)}", None
        )
        if handler is None:
            raise AwsError("InvalidAction", f"{call.service} {call.operation} is not simulated")
        with self.lock:
            return handler(call.parameters)

    def _pass_on(
        self, method: str, path: str, headers: Message, body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        address = urllib.parse.urlsplit(self.aws.endpoint_url)
        connection = http.client.HTTPConnection(address.netloc, timeout=60)
        try:
            kept = {k: v for k, v in headers.items() if k.lower() != "connection"}
            connection.request(method, path, body, kept)
            response = connection.getresponse()
            dropped = {"content-length", "connection", "transfer-encoding", "date", "server"}
            answered = {k: v for k, v in response.getheaders() if k.lower() not in dropped}
            return response.status, answered, response.read()
        finally:
            connection.close()

    def deny(self, operation: str, times: int = 1) -> None:
        """Let the caller lack the permission for an operation, so many times."""
        message = f"User: {ARN} is not authorized to perform: {operation}"
        self.faults[operation] = Fault(AwsError("AccessDeniedException", message), times)

    def called(self, operation: str) -> list[Json]:
        return [call.parameters for call in self.calls if call.operation == operation]

    # --- What Docker pushes -----------------------------------------------------------------

    def _docker(self, action: str, request: Json) -> tuple[int, dict[str, str], bytes]:
        with self.lock:
            if action == "login":
                self.logins.add(request["registry"])
                return 200, {}, b"{}"
            registry, _, name = request["image"].partition("/")
            name, _, tag = name.rpartition(":")
            if registry not in self.logins:
                return 401, {}, b"no basic auth credentials"
            if name not in self.repositories:
                return 404, {}, f"repository {name} does not exist".encode()
            try:
                self.push(name, tag, Path(request["folder"]))
            except ValueError as refusal:
                return 400, {}, str(refusal).encode()
            return 200, {}, b"{}"

    def push(self, repository: str, tag: str, folder: Path) -> Image:
        """Put an image into a repository, whose tags never change."""
        images = self.repositories[repository]
        if any(tag in image.tags for image in images):
            raise ValueError(
                f"tag invalid: The image tag '{tag}' already exists in the '{repository}'"
                " repository and cannot be overwritten because the repository is immutable."
            )
        content = b"".join(path.read_bytes() for path in sorted(folder.iterdir()))
        digest = "sha256:" + hashlib.sha256(content + tag.encode()).hexdigest()
        kept = self.folder / digest.removeprefix("sha256:")
        if not kept.exists():
            shutil.copytree(folder, kept)
        images.append(Image(digest, kept, [tag], time.time()))
        return images[-1]

    # --- STS, EC2, ACM ----------------------------------------------------------------------

    def sts_get_caller_identity(self, _: Json) -> Json:
        return {"Account": ACCOUNT, "Arn": ARN, "UserId": "AIDAEXAMPLE"}

    def ec2_describe_vpcs(self, _: Json) -> Json:
        return {"Vpcs": self.vpcs}

    def ec2_describe_subnets(self, _: Json) -> Json:
        return {
            "Subnets": [
                {
                    "SubnetId": subnet,
                    "VpcId": VPC,
                    "AvailabilityZone": REGION + zone,
                    "MapPublicIpOnLaunch": True,
                }
                for subnet, zone in zip(SUBNETS, "ab", strict=True)
            ]
        }

    def ec2_describe_route_tables(self, _: Json) -> Json:
        route = {"DestinationCidrBlock": "0.0.0.0/0", "GatewayId": "igw-1", "State": "active"}
        association = {"Main": True, "RouteTableAssociationId": "rtbassoc-1"}
        return {
            "RouteTables": [
                {"RouteTableId": "rtb-1", "Associations": [association], "Routes": [route]}
            ]
        }

    def acm_describe_certificate(self, request: Json) -> Json:
        if request["CertificateArn"] != self.certificate["CertificateArn"]:
            raise AwsError("ResourceNotFoundException", "Could not find certificate")
        return {"Certificate": self.certificate}

    def acm_request_certificate(self, _: Json) -> Json:
        return {"CertificateArn": self.certificate["CertificateArn"]}

    # --- CloudFormation ---------------------------------------------------------------------

    def stack(self, name: str) -> StackRecord | None:
        """The stack of a name that is not deleted, or the one of an ARN even when it is."""
        for record in reversed(self.stacks):
            if record.arn == name or (record.name == name and record.deleted_at is None):
                return record
        return None

    def _stack(self, name: str) -> StackRecord:
        record = self.stack(name)
        if record is None:
            raise invalid(f"Stack with id {name} does not exist")
        return record

    def new_stack(self, name: str, status: str, **fields: Any) -> StackRecord:
        arn = f"arn:aws:cloudformation:{REGION}:{ACCOUNT}:stack/{name}/{uuid.uuid4()}"
        record = StackRecord(name, arn, status, **fields)
        self.stacks.append(record)
        return record

    def add_main_stack(self, outputs: Mapping[str, str]) -> None:
        self.new_stack(MAIN_STACK, "CREATE_COMPLETE", outputs=dict(outputs))

    def let_time_pass(self, seconds: float) -> None:
        """Make everything that has happened to the stacks so far older."""
        for record in self.stacks:
            for event in record.events:
                event["Timestamp"] -= datetime.timedelta(seconds=seconds)
        for queue in self._deleted_queues:
            self._deleted_queues[queue] -= seconds

    def request_for(self, image: str = "", **parameters: str) -> Json:
        """What a change set of the gateway's stack is asked for with, with these parameters."""
        (main,) = (record for record in self.stacks if record.name == MAIN_STACK)
        values = {
            **main.outputs,
            "VpcId": VPC,
            "LoadBalancerSubnetIds": ",".join(SUBNETS),
            "TaskSubnetIds": ",".join(SUBNETS),
            "ContainerImage": image,
            **parameters,
        }
        return {
            "StackName": GATEWAY_STACK,
            "ChangeSetName": "earlier",
            "TemplateBody": template.without_comments(template.PATH.read_text("utf-8")),
            "Parameters": as_list(values, "Parameter"),
            "Capabilities": ["CAPABILITY_IAM"],
        }

    def leave(self, status: str, **parameters: str) -> StackRecord:
        """Leave the gateway's stack as a deployment with these parameters may have left it.

        One that never stood is empty; any other has a service on the image of this checkout.
        """
        self.cloudformation_create_change_set(
            self.request_for(**parameters) | {"ChangeSetType": "CREATE"}
        )
        record = self._stack(GATEWAY_STACK)
        if status == "REVIEW_IN_PROGRESS":
            return record
        wanted = record.change_sets.pop("earlier")
        if re.match("ROLLBACK|CREATE_FAILED", status):
            record.parameters, record.body = wanted.parameters, wanted.body
        else:
            self.operate(record, wanted, "deploy-earlier")
            repository = record.outputs["WebSocketRepositoryUri"].partition("/")[2]
            folder = self.folder / "earlier"
            folder.mkdir(exist_ok=True)
            shutil.copy(template.PATH.parent / "server.py", folder)
            digest = self.push(repository, "earlier-amd64", folder).digest
            image = f"{record.outputs['WebSocketRepositoryUri']}@{digest}"
            self.cloudformation_create_change_set(self.request_for(image, **parameters))
            self.operate(record, record.change_sets.pop("earlier"), "deploy-earlier")
            assert record.status == "UPDATE_COMPLETE", record.reason
        self.event(record, "deploy-earlier", record.name, status, "as the test has it")
        self.let_time_pass(300)
        return record

    def cloudformation_describe_stacks(self, request: Json) -> Json:
        if "StackName" in request:
            found = [self._stack(request["StackName"])]
        else:
            found = [record for record in self.stacks if record.deleted_at is None]
        return {
            "Stacks": [
                {
                    "StackName": record.name,
                    "StackId": record.arn,
                    "StackStatus": record.status,
                    "StackStatusReason": record.reason or None,
                    "CreationTime": now(),
                    "Parameters": as_list(record.parameters, "Parameter"),
                    "Outputs": as_list(record.outputs, "Output"),
                    "Capabilities": ["CAPABILITY_IAM"],
                }
                for record in found
            ]
        }

    def cloudformation_list_stacks(self, request: Json) -> Json:
        wanted = request.get("StackStatusFilter")
        return {
            "StackSummaries": [
                {
                    "StackName": record.name,
                    "StackId": record.arn,
                    "StackStatus": record.status,
                    "CreationTime": now(),
                    "DeletionTime": record.deleted_at,
                }
                for record in reversed(self.stacks)
                if not wanted or record.status in wanted
            ]
        }

    def cloudformation_describe_stack_events(self, request: Json) -> Json:
        return {"StackEvents": self._stack(request["StackName"]).events[::-1]}

    def cloudformation_get_template_summary(self, request: Json) -> Json:
        named = request.get("StackName")
        body = self._stack(named).body if named else request["TemplateBody"]
        document = self._parse(body)
        return {
            "Parameters": [
                {
                    "ParameterKey": name,
                    "ParameterType": each["Type"],
                    "DefaultValue": None if "Default" not in each else str(each["Default"]),
                    "NoEcho": False,
                }
                for name, each in document["Parameters"].items()
            ],
            "ResourceTypes": [each["Type"] for each in document["Resources"].values()],
        }

    def _parse(self, body: str) -> Json:
        if len(body.encode()) > TEMPLATE_BYTES:
            raise invalid(
                "1 validation error detected: Value at 'templateBody' failed to satisfy constraint:"
                " Member must have length less than or equal to 51200"
            )
        return template.parse(body)

    def cloudformation_create_change_set(self, request: Json) -> Json:
        name, kind = request["StackName"], request.get("ChangeSetType", "UPDATE")
        record = self.stack(name)
        if kind == "CREATE":
            if record and record.status != "REVIEW_IN_PROGRESS":
                raise AwsError(
                    "AlreadyExistsException",
                    f"Stack [{name}] already exists and cannot be created"
                    " again with the changeSet [x]",
                )
        elif record is None:
            raise invalid(f"Stack [{name}] does not exist")
        elif not re.fullmatch(r"(CREATE|UPDATE|UPDATE_ROLLBACK|IMPORT)_COMPLETE", record.status):
            raise invalid(f"Stack:{record.arn} is in {record.status} state and can not be updated.")
        document = self._parse(request["TemplateBody"])
        capable = {"CAPABILITY_IAM", "CAPABILITY_NAMED_IAM"} & set(request["Capabilities"])
        kinds = {each["Type"] for each in document["Resources"].values()}
        if "AWS::IAM::Role" in kinds and not capable:
            raise AwsError(
                "InsufficientCapabilitiesException", "Requires capabilities : [CAPABILITY_IAM]"
            )
        parameters = self._parameters(
            document, request.get("Parameters", []), record if kind == "UPDATE" else None
        )
        if record is None:
            record = self.new_stack(name, "REVIEW_IN_PROGRESS")
        arn = f"arn:aws:cloudformation:{REGION}:{ACCOUNT}:changeSet/{request['ChangeSetName']}/1"
        made = ChangeSet(
            request["ChangeSetName"], arn, kind, "CREATE_COMPLETE", "", parameters,
            request["TemplateBody"], [],
        )  # fmt: skip
        made.changes = self._changes(record if kind == "UPDATE" else None, made)
        if self.validation:
            made.status = "FAILED"
            made.reason = (
                "The following hook(s)/validation failed: [AWS::EarlyValidation::ResourceExistence"
                "Check]. To troubleshoot Early Validation errors, use the DescribeEvents API for"
                " detailed failure information."
            )
        elif not made.changes:
            made.status, made.reason = "FAILED", NO_CHANGES
        record.change_sets[made.name] = made
        return {"Id": arn, "StackId": record.arn}

    def _parameters(
        self, document: Json, given: list[Json], record: StackRecord | None
    ) -> dict[str, str]:
        """The values of all parameters, or CloudFormation's refusal."""
        declared = document["Parameters"]
        values: dict[str, str] = {}
        for each in given:
            name = each["ParameterKey"]
            if name not in declared:
                raise invalid(f"Parameters: [{name}] do not exist in the template")
            if str(each.get("UsePreviousValue", "")).lower() == "true":
                if record is None or name not in record.parameters:
                    raise invalid(
                        f"Invalid input for parameter key {name}. Cannot specify usePreviousValue"
                        " as true for a parameter key not in the previous template"
                    )
                values[name] = record.parameters[name]
            else:
                values[name] = each.get("ParameterValue", "")
        missing = [n for n, each in declared.items() if n not in values and "Default" not in each]
        if missing:
            raise invalid(f"Parameters: [{', '.join(missing)}] must have values")
        for name, each in declared.items():
            values.setdefault(name, str(each.get("Default")))
            items = values[name].split(",") if "List" in each["Type"] else [values[name]]
            for item in items:
                if not accepts(each, item):
                    raise invalid(
                        f"Parameter {name} failed to satisfy constraint: "
                        + str(each.get("ConstraintDescription", "its allowed values"))
                    )
        evaluated = template.Stack(document, **values)
        for rule in document.get("Rules", {}).values():
            if evaluated(rule.get("RuleCondition", True)):
                for assertion in rule["Assertions"]:
                    if not evaluated(assertion["Assert"]):
                        raise invalid(
                            "Template error: Rule failed: " + assertion["AssertDescription"]
                        )
        return values

    def _changes(self, record: StackRecord | None, wanted: ChangeSet) -> list[Json]:
        new = Evaluated(self, wanted.body, wanted.parameters)
        old = (
            Evaluated(self, record.body, record.parameters).resources
            if record and record.body
            else {}
        )
        types = {
            name: each["Type"] for name, each in template.parse(wanted.body)["Resources"].items()
        }
        changes = []
        for name, properties in new.resources.items():
            before = old.get(name)
            if before == properties:
                continue
            change: Json = {"LogicalResourceId": name, "ResourceType": types[name]}
            if before is None:
                change["Action"] = "Add"
            else:
                differing = {
                    key
                    for key in before.keys() | properties.keys()
                    if before.get(key) != properties.get(key)
                }
                replaced = differing & REPLACED_BY.get(types[name], set())
                change |= {"Action": "Modify", "Replacement": "True" if replaced else "False"}
            changes.append(change)
        changes += [
            {"LogicalResourceId": name, "ResourceType": types.get(name, "?"), "Action": "Remove"}
            for name in old.keys() - new.resources.keys()
        ]
        return [{"Type": "Resource", "ResourceChange": change} for change in changes]

    def _change_set(self, request: Json) -> tuple[StackRecord, ChangeSet]:
        name = request["ChangeSetName"]
        for record in self.stacks:
            for each in record.change_sets.values():
                if name in (each.arn, each.name) and record.deleted_at is None:
                    return record, each
        raise AwsError("ChangeSetNotFoundException", f"ChangeSet [{name}] does not exist")

    def cloudformation_describe_change_set(self, request: Json) -> Json:
        record, made = self._change_set(request)
        return {
            "ChangeSetName": made.name,
            "ChangeSetId": made.arn,
            "StackId": record.arn,
            "StackName": record.name,
            "Status": made.status,
            "StatusReason": made.reason or None,
            "ExecutionStatus": "AVAILABLE" if made.status == "CREATE_COMPLETE" else "UNAVAILABLE",
            "Parameters": as_list(made.parameters, "Parameter"),
            "Changes": made.changes,
        }

    def cloudformation_list_change_sets(self, request: Json) -> Json:
        record = self._stack(request["StackName"])
        return {
            "Summaries": [
                {
                    "ChangeSetName": each.name,
                    "ChangeSetId": each.arn,
                    "Status": each.status,
                    "StatusReason": each.reason or None,
                }
                for each in record.change_sets.values()
            ]
        }

    def cloudformation_delete_change_set(self, request: Json) -> Json:
        record, made = self._change_set(request)
        del record.change_sets[made.name]
        return {}

    def cloudformation_describe_events(self, request: Json) -> Json:
        self._change_set(request)
        return {
            "OperationEvents": [
                {
                    "EventId": str(number),
                    "EventType": "VALIDATION_ERROR",
                    "LogicalResourceId": reason.split(":")[0],
                    "ValidationStatus": "FAILED",
                    "ValidationStatusReason": reason.split(": ", 1)[1],
                    "Timestamp": now(),
                }
                for number, reason in enumerate(self.validation)
            ]
        }

    def cloudformation_execute_change_set(self, request: Json) -> Json:
        record, made = self._change_set(request)
        if made.status != "CREATE_COMPLETE":
            raise AwsError("InvalidChangeSetStatus", f"ChangeSet [{made.arn}] cannot be executed")
        record.change_sets.clear()
        token = request.get("ClientRequestToken")
        self._in_background(self.operate, record, made, token)
        return {}

    def cloudformation_delete_stack(self, request: Json) -> Json:
        record = self.stack(request["StackName"])
        if record is not None and record.deleted_at is None:
            self._in_background(self.delete, record, request.get("ClientRequestToken"))
        return {}

    def cloudformation_continue_update_rollback(self, request: Json) -> Json:
        record = self._stack(request["StackName"])
        if record.status != "UPDATE_ROLLBACK_FAILED":
            raise invalid(f"Stack {record.name} is in {record.status} state")
        self._in_background(self.finish_rollback, record, request.get("ClientRequestToken"))
        return {}

    def cloudformation_rollback_stack(self, request: Json) -> Json:
        record = self._stack(request["StackName"])
        if record.status not in ("UPDATE_FAILED", "CREATE_FAILED"):
            raise invalid(f"Stack {record.name} is in {record.status} state")
        self._in_background(self.finish_rollback, record, request.get("ClientRequestToken"))
        return {}

    def _in_background(self, work: Callable[..., None], record: StackRecord, *args: Any) -> None:
        # The state changes with the request's answer, as a caller that asks at once must see it.
        begun = threading.Event()
        thread = threading.Thread(target=work, args=(record, *args, begun), daemon=True)
        self._threads.append(thread)
        thread.start()
        begun.wait(10)

    def event(
        self, record: StackRecord, token: str | None, what: str, status: str, reason: str = "",
        kind: str = "AWS::CloudFormation::Stack",
    ) -> None:  # fmt: skip
        if what == record.name:
            record.status, record.reason = status, reason
        record.events.append(
            {
                "EventId": str(uuid.uuid4()),
                "StackId": record.arn,
                "StackName": record.name,
                "LogicalResourceId": what,
                "PhysicalResourceId": record.arn if what == record.name else f"physical-{what}",
                "ResourceType": kind,
                "Timestamp": now(),
                "ResourceStatus": status,
                "ResourceStatusReason": reason or None,
                "ClientRequestToken": token,
            }
        )

    def operate(
        self,
        record: StackRecord,
        wanted: ChangeSet,
        token: str | None,
        begun: threading.Event | None = None,
    ) -> None:
        """Carry a change set out, as its own thread."""
        verb = "CREATE" if wanted.kind == "CREATE" else "UPDATE"
        self.event(record, token, record.name, f"{verb}_IN_PROGRESS", "User Initiated")
        if begun:
            begun.set()
        old_parameters, old_body = record.parameters, record.body
        old = Evaluated(self, old_body, old_parameters).resources if old_body else {}
        record.parameters, record.body = wanted.parameters, wanted.body
        stack = Evaluated(self, wanted.body, wanted.parameters)
        kinds = {n: each["Type"] for n, each in template.parse(wanted.body)["Resources"].items()}
        for name, properties in stack.resources.items():
            before = old.get(name)
            if before == properties:
                continue
            doing = "CREATE" if before is None else "UPDATE"
            self.event(record, token, name, f"{doing}_IN_PROGRESS", kind=kinds[name])
            time.sleep(self.resource_s)
            reason = self.failing.pop(name, "") or self._make(kinds[name], properties, stack)
            if reason:
                self.event(record, token, name, f"{doing}_FAILED", reason, kinds[name])
                self._roll_back(record, token, verb, name, old_parameters, old_body)
                return
            record.resources.add(name)
            self.event(record, token, name, f"{doing}_COMPLETE", kind=kinds[name])
        for name in record.resources - stack.resources.keys():
            self.event(record, token, name, "DELETE_COMPLETE", kind=kinds.get(name, "?"))
        record.resources = set(stack.resources)
        record.outputs = stack.outputs
        self.event(record, token, record.name, f"{verb}_COMPLETE")

    def _roll_back(
        self, record: StackRecord, token: str | None, verb: str, name: str,
        parameters: dict[str, str], body: str,
    ) -> None:  # fmt: skip
        reason = f"The following resource(s) failed to {verb.lower()}: [{name}]. "
        prefix = "" if verb == "CREATE" else "UPDATE_"
        self.event(record, token, record.name, f"{prefix}ROLLBACK_IN_PROGRESS", reason)
        if verb == "CREATE":
            self._remove_resources(record, token)
        else:
            record.parameters, record.body = parameters, body
        if "rollback" in self.stuck:
            self.stuck.discard("rollback")
            self.event(record, token, record.name, f"{prefix}ROLLBACK_FAILED", "Cannot undo")
            return
        self.event(record, token, record.name, f"{prefix}ROLLBACK_COMPLETE")

    def finish_rollback(
        self, record: StackRecord, token: str | None, begun: threading.Event
    ) -> None:
        self.event(record, token, record.name, "UPDATE_ROLLBACK_IN_PROGRESS", "User Initiated")
        begun.set()
        if "rollback" in self.stuck:
            self.stuck.discard("rollback")
            self.event(record, token, "EventsTable", "UPDATE_FAILED", "Cannot undo")
            self.event(record, token, record.name, "UPDATE_ROLLBACK_FAILED", "Cannot undo")
            return
        self.event(record, token, record.name, "UPDATE_ROLLBACK_COMPLETE")

    def delete(
        self, record: StackRecord, token: str | None, begun: threading.Event | None = None
    ) -> None:
        if record.status == "REVIEW_IN_PROGRESS":
            record.status, record.deleted_at = "DELETE_COMPLETE", now()
            if begun:
                begun.set()
            return
        self.event(record, token, record.name, "DELETE_IN_PROGRESS", "User Initiated")
        if begun:
            begun.set()
        if "delete" in self.stuck:
            self.stuck.discard("delete")
            self.event(record, token, "Cluster", "DELETE_FAILED", "The Cluster is in use")
            self.event(record, token, record.name, "DELETE_FAILED", "Cluster failed to delete")
            return
        self._remove_resources(record, token)
        self.event(record, token, record.name, "DELETE_COMPLETE")
        record.deleted_at = now()

    def _remove_resources(self, record: StackRecord, token: str | None) -> None:
        document = template.parse(record.body) if record.body else {"Resources": {}}
        stack = Evaluated(self, record.body, record.parameters) if record.body else None
        for name in sorted(record.resources):
            kind = document["Resources"][name]["Type"]
            assert stack is not None
            self._unmake(kind, stack.resources[name])
            self.event(record, token, name, "DELETE_COMPLETE", kind=kind)
        record.resources = set()
        record.outputs = {}

    # --- Resources --------------------------------------------------------------------------

    def _make(self, kind: str, properties: Json, stack: Evaluated) -> str:
        """Make or change a resource; returns why that failed, or nothing."""
        match kind:
            case "AWS::SQS::Queue":
                queue = properties["QueueName"]
                gone = time.time() - self._deleted_queues.get(queue, 0)
                if gone < QUEUE_NAME_REST_S:
                    return (
                        'Resource handler returned message: "You must wait 60 seconds after'
                        ' deleting a queue before you can create another with the same name."'
                    )
                attributes = {"FifoQueue": "true"} if queue.endswith(".fifo") else {}
                sqs = self.aws.client("sqs")
                url = sqs.create_queue(QueueName=queue, Attributes=attributes)["QueueUrl"]
                if "-dlq-" in queue:  # made after the queue whose dead letters it takes
                    policy = {"deadLetterTargetArn": _queue_arn(queue), "maxReceiveCount": 5}
                    sqs.set_queue_attributes(
                        QueueUrl=url.replace("-dlq-", "-"),
                        Attributes={"RedrivePolicy": json.dumps(policy)},
                    )
            case "AWS::SNS::Topic":
                self.aws.client("sns").create_topic(Name=properties["TopicName"])
            case "AWS::DynamoDB::Table":
                keys = {k: properties[k] for k in ("AttributeDefinitions", "KeySchema")}
                with contextlib.suppress(
                    self.aws.client("dynamodb").exceptions.ResourceInUseException
                ):
                    self.aws.client("dynamodb").create_table(
                        TableName=properties["TableName"], BillingMode="PAY_PER_REQUEST", **keys
                    )
            case "AWS::ECR::Repository":
                self.repositories.setdefault(properties["RepositoryName"], [])
            case "AWS::ECS::Service":
                return self._roll_out(properties, stack)
        return ""

    def _unmake(self, kind: str, properties: Json) -> None:
        match kind:
            case "AWS::SQS::Queue":
                queue = properties["QueueName"]
                sqs = self.aws.client("sqs")
                url = sqs.get_queue_url(QueueName=queue)["QueueUrl"]
                sqs.delete_queue(QueueUrl=url)
                self._deleted_queues[queue] = time.time()
            case "AWS::DynamoDB::Table":
                self.aws.client("dynamodb").delete_table(TableName=properties["TableName"])
            case "AWS::ECR::Repository":
                self.repositories.pop(properties["RepositoryName"], None)
            case "AWS::ECS::Service":
                service = self.services.pop(properties["ServiceName"], None)
                for task in service.tasks if service else []:
                    task.process.kill()
                    task.process.wait()

    def _roll_out(self, properties: Json, stack: Evaluated) -> str:
        """Replace the service's task by one of the new task definition, or keep the old one."""
        name, cluster = properties["ServiceName"], properties["Cluster"]
        image = stack.parameters["ContainerImage"]
        service = self.services.setdefault(name, Service(name, cluster, image))
        service.rollout = "IN_PROGRESS"
        service.events.append(f"(service {name}) has started 1 tasks.")
        folder = self._image_folder(image)
        if folder is None:
            service.rollout = "FAILED"
            return f"CannotPullContainerError: {image} not found"
        for _ in range(2):  # how often the circuit breaker lets it try; AWS: three times or more
            task = self._start(folder, stack)
            deadline = time.monotonic() + HEALTHY_WITHIN_S
            while task.process.poll() is None and time.monotonic() < deadline:
                if task.health() == 200:
                    for old in service.tasks:
                        old.process.terminate()
                    service.tasks, service.image = [task], image
                    service.rollout = "COMPLETED"
                    service.events.append(f"(service {name}) has reached a steady state.")
                    return ""
                time.sleep(0.05)
            task.process.kill()
            task.process.wait()
            task.stopped_reason, task.stopped_at = "Essential container in task exited", now()
            service.stopped.append(task)
        service.events.append(f"(service {name}) deployment failed: tasks failed to start.")
        service.rollout = "COMPLETED" if service.tasks else "FAILED"
        return (
            "Resource handler returned message: \"Error occurred during operation 'ECS Deployment"
            " Circuit Breaker was triggered'.\""
        )

    def _image_folder(self, image: str) -> Path | None:
        for images in self.repositories.values():
            for each in images:
                if image.endswith("@" + each.digest):
                    return each.folder
        return None

    def _start(self, folder: Path, stack: Evaluated) -> Task:
        environment = stack.container_environment()
        if environment["AUTH_JWKS_URL"]:
            environment["AUTH_JWKS_URL"] = f"{self.endpoint_url}/keys.json"
        environment |= {
            "WEBSOCKET_HOST": "127.0.0.1",
            "WEBSOCKET_PORT": "0",
            "AWS_ENDPOINT_URL": self.aws.endpoint_url,
            "AWS_ENDPOINT_URL_ELASTIC_LOAD_BALANCING_V2": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": ACCESS_KEY,
            "AWS_EC2_METADATA_DISABLED": "true",
            "no_proxy": "127.0.0.1,localhost",
        }
        process = subprocess.Popen(
            [sys.executable, str(folder / "server.py")],
            env=environment,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        task = Task(uuid.uuid4().hex, process)
        threading.Thread(target=_read_log, args=(task,), daemon=True).start()
        return task

    # --- ECR --------------------------------------------------------------------------------

    def _repository(self, request: Json) -> list[Image]:
        name = request["repositoryName"]
        if name not in self.repositories:
            raise AwsError(
                "RepositoryNotFoundException",
                f"The repository with name '{name}' does not exist in the registry",
            )
        return self.repositories[name]

    def _find(self, request: Json) -> list[Image]:
        found = []
        for wanted in request["imageIds"]:
            matching = [
                image
                for image in self._repository(request)
                if wanted.get("imageTag") in image.tags or wanted.get("imageDigest") == image.digest
            ]
            if not matching:
                raise AwsError("ImageNotFoundException", f"The image with id {wanted} is not there")
            found += matching
        return found

    def ecr_describe_images(self, request: Json) -> Json:
        images = self._find(request) if "imageIds" in request else self._repository(request)
        return {
            "imageDetails": [
                {
                    "imageDigest": image.digest,
                    "imageTags": image.tags or None,
                    "imagePushedAt": datetime.datetime.fromtimestamp(image.pushed_at, datetime.UTC),
                }
                for image in images
            ]
        }

    def ecr_batch_get_image(self, request: Json) -> Json:
        return {
            "images": [
                {
                    "imageId": {"imageDigest": image.digest},
                    "imageManifest": json.dumps({"digest": image.digest}, indent=3),
                }
                for image in self._find(request)
            ]
        }

    def ecr_put_image(self, request: Json) -> Json:
        tag = request["imageTag"]
        for image in self._repository(request):
            if request["imageManifest"] == json.dumps({"digest": image.digest}, indent=3):
                if any(tag in each.tags for each in self._repository(request)):
                    raise AwsError("ImageAlreadyExistsException", "Image with this tag is there")
                image.tags.append(tag)
                return {"image": {"imageId": {"imageDigest": image.digest, "imageTag": tag}}}
        raise AwsError("ImageDigestDoesNotMatchException", "The manifest is of no image here")

    def ecr_get_authorization_token(self, _: Json) -> Json:
        return {
            "authorizationData": [
                {
                    "authorizationToken": "QVdTOnNlY3JldA==",  # AWS:secret
                    "expiresAt": now() + datetime.timedelta(hours=12),
                    "proxyEndpoint": f"https://{REGISTRY}",
                }
            ]
        }

    # --- ECS, ELB, logs ---------------------------------------------------------------------

    def ecs_describe_services(self, request: Json) -> Json:
        found = [self.services[name] for name in request["services"] if name in self.services]
        return {
            "services": [
                {
                    "serviceName": service.name,
                    "status": "ACTIVE",
                    "desiredCount": 1,
                    "runningCount": len(service.tasks),
                    "pendingCount": 0 if service.rollout == "COMPLETED" else 1,
                    "deployments": [{"status": "PRIMARY", "rolloutState": service.rollout}],
                    "events": [
                        {"message": message, "createdAt": now(), "id": str(number)}
                        for number, message in enumerate(reversed(service.events))
                    ],
                }
                for service in found
            ],
            "failures": [],
        }

    def ecs_update_service(self, request: Json) -> Json:
        return {
            "service": self.ecs_describe_services({"services": [request["service"]]})["services"][0]
        }

    def _stopped(self) -> list[Task]:
        return [task for service in self.services.values() for task in service.stopped]

    def ecs_list_tasks(self, _: Json) -> Json:
        prefix = f"arn:aws:ecs:{REGION}:{ACCOUNT}:task/agenticai-cluster-prod"
        return {"taskArns": [f"{prefix}/{task.id}" for task in self._stopped()]}

    def ecs_describe_tasks(self, request: Json) -> Json:
        wanted = {arn.rpartition("/")[2] for arn in request["tasks"]}
        return {
            "tasks": [
                {
                    "taskArn": f"arn:aws:ecs:{REGION}:{ACCOUNT}:task/cluster/{task.id}",
                    "taskDefinitionArn": f"arn:aws:ecs:{REGION}:{ACCOUNT}:task-definition/x:1",
                    "stoppedReason": task.stopped_reason,
                    "stoppedAt": task.stopped_at,
                    "containers": [{"name": "websocket", "exitCode": task.process.returncode}],
                }
                for task in self._stopped()
                if task.id in wanted
            ]
        }

    def elbv2_describe_target_health(self, _: Json) -> Json:
        health = [
            (task, task.health()) for service in self.services.values() for task in service.tasks
        ]
        return {
            "TargetHealthDescriptions": [
                {
                    "Target": {"Id": "127.0.0.1", "Port": task.port},
                    "TargetHealth": {"State": "healthy"}
                    if status == 200
                    else {
                        "State": "unhealthy",
                        "Description": f"Health checks failed with these codes: [{status}]",
                    },
                }
                for task, status in health
            ]
        }

    def application_autoscaling_describe_scaling_activities(self, _: Json) -> Json:
        return {"ScalingActivities": []}

    def logs_filter_log_events(self, _: Json) -> Json:
        lines = [
            line
            for service in self.services.values()
            for task in service.tasks
            for line in task.log
        ]
        stamp = int(time.time() * 1000)
        return {"events": [{"message": line, "timestamp": stamp} for line in lines]}

    def logs_get_log_events(self, request: Json) -> Json:
        task_id = request["logStreamName"].rpartition("/")[2]
        for task in self._stopped():
            if task.id == task_id:
                stamp = int(time.time() * 1000)
                lines = task.log[-int(request.get("limit", 20)) :]
                return {"events": [{"message": line, "timestamp": stamp} for line in lines]}
        raise AwsError("ResourceNotFoundException", "The specified log stream does not exist.")


ARN = f"arn:aws:iam::{ACCOUNT}:user/deployer"


def _read_log(task: Task) -> None:
    assert task.process.stdout is not None
    for line in task.process.stdout:
        task.log.append(line.rstrip("\n"))
        with contextlib.suppress(ValueError, AttributeError):
            entry = json.loads(line)
            if entry.get("message") == "listening":
                task.port = int(entry["port"])


def accepts(parameter: Json, value: str) -> bool:
    """Whether CloudFormation would take ``value``."""
    if "AllowedPattern" in parameter and not re.fullmatch(parameter["AllowedPattern"], value):
        return False
    if "AllowedValues" in parameter and value not in map(str, parameter["AllowedValues"]):
        return False
    low, high = parameter.get("MinValue"), parameter.get("MaxValue")
    if low is None and high is None:
        return True
    return value.isdigit() and int(low or 0) <= int(value) <= int(high or 10**9)


def main_outputs(aws: MotoAws, prefix: str) -> dict[str, str]:
    """A platform's table and queues in moto, as its main stack puts them out."""
    platform = aws.create_platform(prefix=prefix)
    outputs = {"DataTableName": platform.table_name}
    for agent in ("PM", "Dev", "QA", "Ops"):
        queue = platform.queue_urls[agent.lower()].rpartition("/")[2]
        outputs[f"{agent}QueueUrl"] = f"https://sqs.{REGION}.amazonaws.com/{ACCOUNT}/{queue}"
    return outputs


@contextlib.contextmanager
def running(aws: MotoAws, folder: Path, prefix: str) -> Iterator[Cloud]:
    """A cloud with a main stack on a platform of its own."""
    with Cloud(aws, folder) as cloud:
        cloud.add_main_stack(main_outputs(aws, prefix))
        yield cloud
