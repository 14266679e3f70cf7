"""Facts of a node are read from files that the kernel lays out; what is not there is null."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.measure.node import device_numa_node, fabric, network, numa, operating_system, processors, scheduler_job


@pytest.fixture
def put(tmp_path: Path):
    """Write a file of the kernel's below another root."""

    def put(name: str, content: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
        return path

    return put


def test_processors_of_two_sockets_under_a_quota(put, tmp_path):
    cores = [f"processor : {core}\nmodel name\t: Intel(R) Xeon(R) Platinum 8480C\nphysical id\t: {core % 2}\n" for core in range(4)]
    put("proc/cpuinfo", "\n".join(cores))
    put("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "performance")
    put("sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq", "3800000")
    put("sys/fs/cgroup/cpu.max", "1600000 100000")
    assert processors(tmp_path) == {
        "cpu": "Intel(R) Xeon(R) Platinum 8480C", "sockets": 2, "cpu_governor": "performance", "cpu_highest_megahertz": 3800,
        "cpu_quota_cores": 16.0,
    }  # fmt: skip
    put("sys/fs/cgroup/cpu.max", "max 100000")
    assert processors(tmp_path)["cpu_quota_cores"] is None


def test_numa_nodes_in_the_order_of_their_numbers(put, tmp_path):
    for node in (10, 2):
        put(f"sys/devices/system/node/node{node}/cpulist", f"{node}-{node + 1}")
        put(f"sys/devices/system/node/node{node}/meminfo", f"Node {node} MemTotal:       1024 kB")
    assert numa(tmp_path) == [
        {"node": 2, "cpus": "2-3", "memory_bytes": 1 << 20},
        {"node": 10, "cpus": "10-11", "memory_bytes": 1 << 20},
    ]


def test_interfaces_with_speed_driver_and_numa_node(put, tmp_path):
    net = "sys/class/net"
    put(f"{net}/lo/operstate", "unknown")
    put(f"{net}/docker0/operstate", "down")
    put(f"{net}/veth1/operstate", "up")
    put(f"{net}/veth1/speed", "-1")
    for name, content in {"operstate": "up", "speed": "200000", "mtu": "9000", "device/numa_node": "1"}.items():
        put(f"{net}/ens1/{name}", content)
    put("sys/bus/pci/drivers/mlx5_core/module", "")
    (tmp_path / net / "ens1/device/driver").symlink_to(tmp_path / "sys/bus/pci/drivers/mlx5_core")
    assert network(tmp_path) == [
        {"name": "ens1", "state": "up", "megabits_per_second": 200_000, "driver": "mlx5_core", "mtu": 9000, "numa_node": 1},
        {"name": "veth1", "state": "up", "megabits_per_second": None, "driver": None, "mtu": None, "numa_node": None},
    ]


def test_ports_of_an_rdma_adapter(put, tmp_path):
    adapter = "sys/class/infiniband/mlx5_0"
    for name, content in {"hca_type": "MT4129", "fw_ver": "28.39.1002", "device/numa_node": "-1", "ports/1/link_layer": "InfiniBand",
                          "ports/1/state": "4: ACTIVE", "ports/1/rate": "400 Gb/sec (4X NDR)"}.items():  # fmt: skip
        put(f"{adapter}/{name}", content)
    assert fabric(tmp_path) == [
        {"adapter": "mlx5_0", "port": 1, "link_layer": "InfiniBand", "state": "4: ACTIVE", "rate": "400 Gb/sec (4X NDR)", "type": "MT4129",
         "firmware": "28.39.1002", "numa_node": None}
    ]  # fmt: skip


def test_a_device_s_numa_node_is_found_by_its_bus_as_nvml_writes_it(put, tmp_path):
    put("sys/bus/pci/devices/0000:1b:00.0/numa_node", "1")
    assert device_numa_node("00000000:1B:00.0", tmp_path) == 1
    assert device_numa_node("00000000:2B:00.0", tmp_path) is None
    assert device_numa_node(None, tmp_path) is None


def test_an_empty_machine_gives_nulls_and_no_error(tmp_path):
    assert set(processors(tmp_path).values()) == {None}
    assert (numa(tmp_path), network(tmp_path), fabric(tmp_path), operating_system(tmp_path)) == ([], [], [], None)


def test_the_distribution_is_named(put, tmp_path):
    put("etc/os-release", 'NAME="Debian"\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"')
    assert operating_system(tmp_path) == "Debian GNU/Linux 12 (bookworm)"


@pytest.mark.parametrize(
    ("variables", "job"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_PARTITION": "gpu", "SLURM_JOB_NODELIST": "n[1-2]"},
         {"scheduler": "slurm", "job": "7", "array_task": "3", "partition": "gpu", "nodes": "n[1-2]"}),
        ({"PBS_JOBID": "9.head", "PBS_QUEUE": "long"}, {"scheduler": "pbs", "job": "9.head", "partition": "long"}),
        ({"LSB_JOBID": "5", "LSB_HOSTS": "a b"}, {"scheduler": "lsf", "job": "5", "nodes": "a b"}),
    ],
)  # fmt: skip
def test_a_job_of_a_scheduler_is_known_by_its_variables(variables, job):
    assert scheduler_job({"HOME": "/root", **variables}) == job
