"""What passes about linear layers share."""
