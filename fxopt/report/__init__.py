"""What was done to a model and what it cost, for people and for programs."""

from fxopt.report.fields import Domain, Step
from fxopt.report.graph_picture.picture import GraphPicture, PictureNode, picture
from fxopt.report.report import Report

__all__ = ["Domain", "GraphPicture", "PictureNode", "Report", "Step", "picture"]
