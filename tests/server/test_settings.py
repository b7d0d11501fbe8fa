"""Settings that contradict each other, have no effect, or are meant to be others."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest

import aws_standin
from server import Settings, SettingsError
from tests.server.gateways import AUTHENTICATION, REQUIRED
from tests.server.processes import process_of


def faults(**values: str) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        Settings.from_mapping({**REQUIRED, **values})
    return caught.value.faults


def doubts(**values: str) -> list[str]:
    environment = {**REQUIRED, **values}
    return Settings.from_mapping(environment).doubts(environment)


class TestHalfOfTokens:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("AUTH_ISSUER", "https://issuer.example"),
            ("AUTH_AUDIENCE", "gateway"),
            ("AUTH_AUDIENCE_CLAIM", "client_id"),
            ("AUTH_ALGORITHMS", "RS256"),
            ("AUTH_PROJECTS_CLAIM", "projects"),
            ("AUTH_FIRST_MESSAGE", "off"),
            ("AUTH_DEADLINE_SECONDS", "5"),
        ],
    )
    def test_without_keys(self, name: str, value: str) -> None:
        """Who sets up tokens and forgets where the keys are does not get an open gateway."""
        assert faults(**{name: value}) == (f"{name} has no effect without AUTH_JWKS_URL",)
        assert faults(**{name: value, "AUTH_JWKS_URL": " "}) == faults(**{name: value})

    def test_every_one_of_them(self) -> None:
        """Every setting of tokens is named at once."""
        own = {
            name for name in map(str.upper, Settings.__dataclass_fields__) if "AUTH_" in name[:5]
        }
        values = {name: AUTHENTICATION.get(name, "x") for name in own - {"AUTH_JWKS_URL"}}
        named = {fault.split()[0] for fault in faults(**values)}
        assert named == own - {"AUTH_JWKS_URL"}
        assert len(own) == 8

    def test_blank(self) -> None:
        """Blank ones are none, as templates have them."""
        blank = dict.fromkeys(("AUTH_JWKS_URL", "AUTH_ISSUER", "AUTH_ALGORITHMS"), "")
        assert doubts(**blank) == []

    def test_keys_that_are_wrong(self) -> None:
        """A wrong URL is the only fault that is named."""
        [fault] = faults(**{**AUTHENTICATION, "AUTH_JWKS_URL": "ftp://keys"})
        assert fault.startswith("AUTH_JWKS_URL must be")

    @pytest.mark.parametrize(
        ("wrong", "meant"),
        [
            ("AUTH_JWK_URL", "AUTH_JWKS_URL"),
            ("AUTH_JWKS_URI", "AUTH_JWKS_URL"),
            ("AUTH_JWKSURL", "AUTH_JWKS_URL"),
            ("AUTH_ISUER", "AUTH_ISSUER"),
            ("AUTH_AUDIENCES", "AUTH_AUDIENCE"),
            ("auth_jwks_url", "AUTH_JWKS_URL"),
            ("AUHT_JWKS_URL", "AUTH_JWKS_URL"),
            ("AUTH_ISSEUR", "AUTH_ISSUER"),
        ],
    )
    def test_misspelt(self, wrong: str, meant: str) -> None:
        """A name one or two letters from one of ours is a mistake that leaves the doors open."""
        assert faults(**{wrong: "x"}) == (f"{wrong} is no setting of this server, unlike {meant}",)

    @pytest.mark.parametrize(
        "name", ["AUTH_PORT", "AUTH_TOKEN", "AUTH_SERVICE_HOST", "AUTH_ISSUER_URL"]
    )
    def test_of_the_platform(self, name: str) -> None:
        """Platforms set variables of their own for each service, of one named `auth` as well."""
        assert doubts(**{name: "tcp://10.0.0.1:80"}) == [f"{name} is no setting of this server"]

    def test_of_another_program(self) -> None:
        """Programs beside ours have settings for OAuth, and ours starts nevertheless."""
        said = ["OAUTH_ISSUER is no setting of this server, unlike AUTH_ISSUER"]
        assert doubts(OAUTH_ISSUER="https://issuer.example") == said
        assert doubts(**AUTHENTICATION, OAUTH_ISSUER="https://issuer.example") == said


class TestDoubts:
    @pytest.mark.parametrize(
        ("name", "value", "needs"),
        [
            ("EVENT_RETENTION_HOURS", "48", "SQS_QUEUE_URL_UPDATES"),
            ("TASK_HEARTBEAT_SECONDS", "10", "UPDATES_TOPIC_ARN"),
        ],
    )
    def test_without_effect(self, name: str, value: str, needs: str) -> None:
        """A setting that does nothing without another is named, unless it is the default."""
        assert doubts(**{name: value}) == [f"{name} has no effect without {needs}"]
        default = getattr(Settings.from_mapping(REQUIRED), name.lower())
        assert doubts(**{name: f"{default:g}"}) == []

    def test_deadline_without_first_message(self) -> None:
        late = {**AUTHENTICATION, "AUTH_DEADLINE_SECONDS": "9"}
        assert doubts(**late) == ["AUTH_DEADLINE_SECONDS has no effect without AUTH_FIRST_MESSAGE"]
        assert doubts(**late, AUTH_FIRST_MESSAGE="on") == []

    def test_misspelt(self) -> None:
        """A name that is nearly one of ours is named, and no other."""
        others = {
            "PATH": "/bin",
            "HOME": "/",
            "PORT": "80",
            "AWS_DEFAULT_REGION": "x",
            "LEVEL": "1",
        }
        assert doubts(MAX_CONECTIONS="5", **others) == [
            "MAX_CONECTIONS is no setting of this server, unlike MAX_CONNECTIONS"
        ]

    @pytest.mark.parametrize(
        "name",
        [
            "MAX_FAILED_AUTHENTICATIONS_PER_IP",
            "MAX_HANDSHAKES_PER_SECOND",
            "MAX_HANDSHAKES_PER_SECOND_PER_IP",
        ],
    )
    def test_limits_of_earlier_versions(self, name: str) -> None:
        """A limit that an earlier version had, and its template may still set, is named."""
        assert doubts(**{name: "5"}) == [f"{name} is no setting of this server"]
        assert doubts(**{name: ""}) == []

    async def test_are_logged(self, platform: aws_standin.Platform) -> None:
        """The server starts, and says what it passes over."""
        async with process_of(platform.environment(), AUTH_PORT="1", MAX_CONECTIONS="5") as process:
            await process.listening()
        warnings = [line["message"] for line in process.log if line["level"] == "WARNING"]
        assert "AUTH_PORT is no setting of this server" in warnings
        assert "MAX_CONECTIONS is no setting of this server, unlike MAX_CONNECTIONS" in warnings

    async def test_exit_code(self, platform: aws_standin.Platform) -> None:
        """An open gateway that somebody meant to close does not even start."""
        async with process_of(platform.environment(), AUTH_JWK_URL="https://k/") as process:
            code, stderr = await process.ends()
        assert code == 2
        assert "AUTH_JWK_URL is no setting of this server, unlike AUTH_JWKS_URL" in stderr


class TestRegions:
    @pytest.mark.parametrize(
        "url",
        [
            "https://sqs.eu-west-1.amazonaws.com/123456789012/dev",
            "https://eu-west-1.queue.amazonaws.com/123456789012/dev",
            "https://sqs-fips.us-gov-west-1.amazonaws.com/123456789012/dev",
            "https://sqs.cn-north-1.amazonaws.com.cn/123456789012/dev",
            "https://vpce-0a1b-x.sqs.ap-southeast-2.vpce.amazonaws.com/123456789012/dev",
            "https://sqs.eusc-de-east-1.amazonaws.eu/123456789012/dev",
            "https://sqs.us-iso-east-1.c2s.ic.gov/123456789012/dev",
        ],
    )
    def test_queue_of_another(self, url: str) -> None:
        """The calls would go to a region where there is no such queue."""
        [fault] = faults(SQS_QUEUE_URL_DEV=url)
        assert fault.startswith("AWS_REGION is us-east-1, but SQS_QUEUE_URL_DEV is in ")
        region = fault.rpartition(" ")[2]
        assert f"{region}." in url
        assert len(faults(SQS_QUEUE_URL_DEV=url, AWS_REGION=region)) == 3  # the other queues

    @pytest.mark.parametrize(
        ("name", "resource"),
        [
            ("UPDATES_TOPIC_ARN", "sns:eu-west-1:123456789012:updates"),
            (
                "TARGET_GROUP_ARN",
                "elasticloadbalancing:eu-west-1:123456789012:targetgroup/t/0123456789abcdef",
            ),
        ],
    )
    def test_arn_of_another(self, name: str, resource: str) -> None:
        assert faults(**{name: f"arn:aws:{resource}"}) == (
            f"AWS_REGION is us-east-1, but {name} is in eu-west-1",
        )

    def test_keys_of_another(self) -> None:
        """The issuer of the tokens may be anywhere."""
        keys = "https://cognito-idp.eu-west-1.amazonaws.com/pool/.well-known/jwks.json"
        Settings.from_mapping({**REQUIRED, **AUTHENTICATION, "AUTH_JWKS_URL": keys})

    @pytest.mark.parametrize(
        "url",
        ["http://127.0.0.1:4566/1/q", "http://localhost:9324/q", "https://queue.amazonaws.com/1/q"],
    )
    def test_without_one(self, url: str) -> None:
        """URLs without a region contradict nothing."""
        assert doubts(SQS_QUEUE_URL_DEV=url) == []

    def test_fault_of_the_url_itself(self) -> None:
        """A setting that cannot be read has no region either."""
        assert len(faults(SQS_QUEUE_URL_DEV="eu-west-1", UPDATES_TOPIC_ARN="eu-west-1")) == 2


class TestSettings:
    def test_blank_is_the_default(self) -> None:
        """An optional setting that is blank has its default: so templates leave parameters out."""
        values = {**REQUIRED, "UPDATES_TOPIC_ARN": "", "WEBSOCKET_PORT": " "}
        assert Settings.from_mapping(values) == Settings.from_mapping(REQUIRED)

    def test_authentication(self) -> None:
        """Who names an issuer's keys has to say for whom its tokens are, too."""
        keys = {**REQUIRED, "AUTH_JWKS_URL": "https://issuer.example/keys"}
        with pytest.raises(SettingsError) as caught:
            Settings.from_mapping(keys)
        assert caught.value.faults == (
            "AUTH_ISSUER is missing: `iss` of the tokens; needed with keys",
            "AUTH_AUDIENCE is missing: whom the tokens are for; needed with keys",
        )
        values = {
            **keys,
            "AUTH_ISSUER": "https://issuer.example",
            "AUTH_AUDIENCE": "gateway",
            "AUTH_ALGORITHMS": "RS256, ES256",
            "ALLOWED_ORIGINS": "https://app.example,http://localhost:3000 ,http://[::1]:8000",
        }
        found = Settings.from_mapping(values)
        assert found.auth_algorithms == ("RS256", "ES256")
        assert found.allowed_origins == (
            "https://app.example",
            "http://localhost:3000",
            "http://[::1]:8000",
        )

    @pytest.mark.parametrize(
        ("url", "allowed"),
        [
            ("https://issuer.example/keys", True),
            ("http://127.0.0.1:4100/keys", True),
            ("http://localhost/keys", True),
            ("http://issuer.example/keys", False),
            ("https://", False),
            ("file:///etc/keys", False),
            ("http://localhost.evil.example/keys", False),
        ],
    )
    def test_keys_url(self, url: str, allowed: bool) -> None:
        """Keys are read over TLS, or from this machine."""
        values = {
            **REQUIRED,
            "AUTH_ISSUER": "https://issuer.example",
            "AUTH_AUDIENCE": "gateway",
            "AUTH_JWKS_URL": url,
        }
        expectation = (
            contextlib.nullcontext() if allowed else pytest.raises(SettingsError, match="https")
        )
        with expectation:
            Settings.from_mapping(values)

    def test_frozen(self) -> None:
        """Settings do not change while the server runs."""
        with pytest.raises(dataclasses.FrozenInstanceError):
            Settings.from_mapping(REQUIRED).websocket_port = 1  # type: ignore[misc]
