"""The policy for whoever deploys: no more than the scripts call and the template makes."""

from __future__ import annotations

import json
import re
from typing import Any

import botocore.session
import pytest
from botocore import xform_name

from tests import template
from tests.deployment import policy
from tests.scripts import (
    COMMON,
    CONNECTION,
    DEPLOY,
    assigned_literals,
    aws_calls,
    bare,
    enclosing,
    literal,
    variable_name,
)

PUSH = {
    f"ecr:{name}"
    for name in (
        "BatchCheckLayerAvailability",
        "CompleteLayerUpload",
        "GetDownloadUrlForLayer",
        "InitiateLayerUpload",
        "UploadLayerPart",
    )
}
"""What ``docker push`` asks of the registry, besides what the script itself does."""

MADE_BY = {
    "AWS::ApplicationAutoScaling::ScalableTarget": "application-autoscaling:RegisterScalableTarget",
    "AWS::ApplicationAutoScaling::ScalingPolicy": "application-autoscaling:PutScalingPolicy",
    "AWS::CloudWatch::Alarm": "cloudwatch:PutMetricAlarm",
    "AWS::CloudWatch::Dashboard": "cloudwatch:PutDashboard",
    "AWS::DynamoDB::Table": "dynamodb:CreateTable",
    "AWS::EC2::SecurityGroup": "ec2:CreateSecurityGroup",
    "AWS::EC2::SecurityGroupIngress": "ec2:AuthorizeSecurityGroupIngress",
    "AWS::ECR::Repository": "ecr:CreateRepository",
    "AWS::ECS::Cluster": "ecs:CreateCluster",
    "AWS::ECS::Service": "ecs:CreateService",
    "AWS::ECS::TaskDefinition": "ecs:RegisterTaskDefinition",
    "AWS::ElasticLoadBalancingV2::Listener": "elasticloadbalancing:CreateListener",
    "AWS::ElasticLoadBalancingV2::LoadBalancer": "elasticloadbalancing:CreateLoadBalancer",
    "AWS::ElasticLoadBalancingV2::TargetGroup": "elasticloadbalancing:CreateTargetGroup",
    "AWS::IAM::Role": "iam:CreateRole",
    "AWS::Logs::LogGroup": "logs:CreateLogGroup",
    "AWS::Route53::RecordSet": "route53:ChangeResourceRecordSets",
    "AWS::SNS::Subscription": "sns:Subscribe",
    "AWS::SNS::Topic": "sns:CreateTopic",
    "AWS::SNS::TopicPolicy": "sns:SetTopicAttributes",
    "AWS::SQS::Queue": "sqs:CreateQueue",
    "AWS::SQS::QueuePolicy": "sqs:SetQueueAttributes",
    "AWS::WAFv2::WebACLAssociation": "wafv2:AssociateWebACL",
}


def called_by_scripts() -> set[str]:
    """The IAM actions of every call that stands in the scripts."""
    session = botocore.session.get_session()
    found = set()
    for script in (DEPLOY, CONNECTION, COMMON):
        for words in aws_calls(script):
            service = str(literal(words[0]))
            operations = {str(literal(words[1]))}
            if literal(words[1]) is None:
                function = enclosing(words[0], "function_statement")
                assert function
                operations = assigned_literals(function, variable_name(bare(words[1])))
            names = session.get_service_model(service).operation_names
            by_option = {xform_name(name, "-"): name for name in names}
            by_option["get-login-password"] = "GetAuthorizationToken"
            prefix = "elasticloadbalancing" if service == "elbv2" else service
            found |= {f"{prefix}:{by_option[operation]}" for operation in operations}
    return found


def test_allows_what_the_scripts_call_and_nothing_else() -> None:
    """Without going through CloudFormation: the calls in the scripts, and docker's push."""
    passed_on = {"iam:PassRole", "iam:CreateServiceLinkedRole"}  # asked of the caller for others
    assert policy.actions(called_via=None) - passed_on == called_by_scripts() | PUSH


def test_allows_what_the_template_makes() -> None:
    kinds = {resource["Type"] for resource in template.load()["Resources"].values()}
    assert kinds == MADE_BY.keys()
    by_cloudformation = policy.actions(called_via="cloudformation.amazonaws.com")
    assert set(MADE_BY.values()) <= by_cloudformation


def test_changes_nothing_of_others() -> None:
    """What changes anything is limited to this project's names, or to CloudFormation's doing."""
    for statement in policy.statements():
        if statement["Resource"] == "*" and "Condition" not in statement:
            reading = re.compile(r"\w+:(Describe|Get|List)\w+")
            assert all(reading.fullmatch(action) for action in statement["Action"])


def test_is_short_enough() -> None:
    """An inline policy of a role has at most 10,240 characters, white space not counted."""
    assert len(re.sub(r"\s", "", json.dumps(policy.statements()))) <= 10_240


@pytest.mark.parametrize("statement", policy.statements(), ids=lambda each: each["Sid"])
def test_names_exist(statement: dict[str, Any]) -> None:
    """Actions are sorted, and each is an operation of its service where the name says so."""
    assert statement["Action"] == sorted(set(statement["Action"]))
    assert re.fullmatch(r"[A-Z]\w+", statement["Sid"])
