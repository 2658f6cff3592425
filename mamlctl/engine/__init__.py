"""The mathematics, on the device."""
