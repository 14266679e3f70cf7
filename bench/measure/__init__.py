"""What is measured beside the laps: devices, telemetry, provenance, evidence."""
