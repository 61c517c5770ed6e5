"""A run of the doctor, on this host alone or together with the doctors of other hosts."""

from shoal.doctor.examine import examine_host, report_of_host
from shoal.doctor.settings import Settings
from shoal.wire.doctor import DoctorReport


def run(settings: Settings) -> DoctorReport:
    """Examine this host, and with `nnodes` above 1 the connections to the others, and return the report."""
    return report_of_host(examine_host(settings))
