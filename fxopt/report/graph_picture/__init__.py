"""A graph as a picture: nested boxes, folded and laid out, drawn as inline SVG."""
