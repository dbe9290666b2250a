"""What was done to a model and what it cost, for people and for programs."""

from fxopt.report.graph_picture.picture import GraphPicture, PictureNode, picture
from fxopt.report.report import Domain, Report, Step

__all__ = ["Domain", "GraphPicture", "PictureNode", "Report", "Step", "picture"]
