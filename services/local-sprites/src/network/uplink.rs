//! A Sprite's own network: a namespace that belongs to this machine's root, so that nothing in a
//! Sprite can change it, and a process (pasta) that carries its traffic from there to public
//! addresses. It outlives this server, as the Sprite does.
//!
//! What is not public has no route there: this machine's addresses, private and special ranges.
//! Names are resolved by the machine's own servers.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use rustix::{mount::UnmountFlags, thread::UnshareFlags};
use tokio::process::Command;

use crate::isolation::process::Process;

const START_MAX: Duration = Duration::from_secs(20);
/// The addresses in a Sprite's network, of a range that is for such use (RFC 7335): its own, the
/// way out, and where names are asked for.
const ADDRESS: &str = "192.0.0.2";
const PREFIX_BITS: &str = "29";
const GATEWAY: &str = "192.0.0.1";
pub const NAME_SERVER: &str = "192.0.0.3";

/// What is not public (RFC 6890). The Sprite's own network is within the second of them, and a
/// longer prefix wins.
const NOT_PUBLIC: [&str; 12] = [
    "0.0.0.0/8",
    "192.0.0.0/24",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "224.0.0.0/4",
    "240.0.0.0/4",
    "255.255.255.255/32",
];

/// A network namespace: a mount, by which other programs find it, until that is removed.
#[derive(Debug)]
pub struct Namespace(PathBuf);

impl Namespace {
    /// Makes one with a loopback device, which `addresses` are on, and without routes to what is
    /// not public.
    pub async fn make(path: PathBuf, addresses: Vec<Ipv4Addr>) -> io::Result<Self> {
        let namespace = Self(path.clone());
        tokio::task::spawn_blocking(move || {
            fs::write(&path, "")?;
            // A thread of its own: it stays in that namespace, and ends.
            std::thread::spawn(move || make(&path, &addresses))
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("no network namespace can be made")))
        })
        .await??;
        Ok(namespace)
    }

    /// Takes it out of this machine's table of mounts, which ends what carries its traffic; those
    /// who are in it keep it.
    pub fn remove(path: &Path) {
        let _ = rustix::mount::unmount(path, UnmountFlags::DETACH);
        let _ = fs::remove_file(path);
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Connects it to public addresses. `loopback_ports` of this machine are found at the same
    /// ports of the Sprite's loopback.
    pub async fn connect(&self, loopback_ports: &[u16], pid_file: PathBuf) -> io::Result<Process> {
        let _ = fs::remove_file(&pid_file);
        let ports: Vec<String> = loopback_ports.iter().map(u16::to_string).collect();
        let ports = if ports.is_empty() { "none".to_owned() } else { ports.join(",") };
        let mut command = Command::new("pasta");
        command
            .args([
                "--runas",
                "0",
                "--quiet",
                "--config-net",
                "--ipv4-only",
                "--netns-only",
                "--netns",
            ])
            .arg(self.path());
        command.args([
            "--address",
            ADDRESS,
            "--netmask",
            PREFIX_BITS,
            "--gateway",
            GATEWAY,
            "--no-map-gw",
            "--ns-ifname",
            "eth0",
        ]);
        command.args([
            "--dns-forward",
            NAME_SERVER,
            "--no-dhcp",
            "--no-dhcpv6",
            "--no-ndp",
            "--no-ra",
        ]);
        command.args([
            "--tcp-ports",
            "none",
            "--udp-ports",
            "none",
            "--udp-ns",
            "none",
            "--tcp-ns",
            &ports,
        ]);
        command.arg("--pid").arg(&pid_file);
        command
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let output = tokio::time::timeout(START_MAX, command.output())
            .await
            .map_err(|_| io::Error::other("pasta does not start"))?;
        let output = output.map_err(|error| {
            io::Error::new(error.kind(), format!("pasta (of the package passt): {error}"))
        })?;
        let pid = fs::read_to_string(&pid_file).ok().and_then(|text| text.trim().parse().ok());
        match pid.and_then(Process::find) {
            Some(process) if output.status.success() => Ok(process),
            _ => {
                let said = String::from_utf8_lossy(&output.stderr)
                    .lines()
                    .rfind(|line| !line.contains("syslog"))
                    .map(str::to_owned);
                Err(io::Error::other(format!(
                    "pasta: {}",
                    said.unwrap_or_else(|| "failed and said nothing".to_owned())
                )))
            }
        }
    }
}

fn make(path: &Path, addresses: &[Ipv4Addr]) -> io::Result<()> {
    #[expect(
        deprecated,
        reason = "sound for a namespace of the network; the other one is unsafe for the sake of descriptors"
    )]
    rustix::thread::unshare(UnshareFlags::NEWNET)?;
    // Low ports and pings are allowed to all users: none in the Sprite has rights over this
    // namespace.
    fs::write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0")?;
    let _ = fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647");
    let mut batch = "link set lo up\n".to_owned();
    for address in addresses.iter().filter(|address| !address.is_loopback()) {
        batch.push_str(&format!("addr add {address}/32 dev lo\n"));
    }
    let own: Vec<String> = machine_addresses()
        .into_iter()
        .filter(IpAddr::is_ipv4)
        .map(|address| format!("{address}/32"))
        .collect();
    for range in NOT_PUBLIC.iter().map(|range| (*range).to_owned()).chain(own) {
        batch.push_str(&format!("route add unreachable {range}\n"));
    }
    let mut ip = std::process::Command::new("ip");
    ip.args(["-force", "-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut ip = ip.spawn().map_err(|error| {
        io::Error::new(error.kind(), format!("ip (of the package iproute2): {error}"))
    })?;
    if let Some(mut stdin) = ip.stdin.take() {
        io::Write::write_all(&mut stdin, batch.as_bytes())?;
    }
    let output = ip.wait_with_output()?;
    if !output.status.success() {
        return Err(io::Error::other(format!(
            "ip: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )));
    }
    Ok(rustix::mount::mount_bind("/proc/thread-self/ns/net", path)?)
}

/// This machine's own addresses, but for its loopback's.
pub fn machine_addresses() -> Vec<IpAddr> {
    // The process's, not the thread's, which may be in another namespace.
    let table = |name: &str| {
        fs::read_to_string(format!("/proc/{}/net/{name}", std::process::id())).unwrap_or_default()
    };
    let v4 = local_addresses(&table("fib_trie")).into_iter().map(IpAddr::from);
    v4.chain(interface_addresses(&table("if_inet6")).into_iter().map(IpAddr::from)).collect()
}

/// What the kernel's table of IPv6 addresses holds: in each line an address of 32 digits first.
fn interface_addresses(table: &str) -> Vec<Ipv6Addr> {
    let address = |line: &str| u128::from_str_radix(line.split(' ').next()?, 16).ok();
    table
        .lines()
        .filter_map(address)
        .map(Ipv6Addr::from)
        .filter(|address| !address.is_loopback())
        .collect()
}

/// What the kernel's table of routes has as its own: the leaf, and in the next line what it is.
fn local_addresses(trie: &str) -> Vec<Ipv4Addr> {
    let lines: Vec<&str> = trie.lines().collect();
    let leaf = |pair: &[&str]| {
        let address = pair.first()?.trim().strip_prefix("|-- ")?;
        pair.get(1)?.contains("/32 host LOCAL").then(|| address.parse::<Ipv4Addr>().ok()).flatten()
    };
    let mut found: Vec<Ipv4Addr> =
        lines.windows(2).filter_map(leaf).filter(|address| !address.is_loopback()).collect();
    found.sort();
    found.dedup();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machines_addresses_are_read() {
        let trie = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 0.0.0.0\n        /0 universe UNICAST\n     +-- 127.0.0.0/8 2 0 2\n           |-- 127.0.0.1\n              /32 host LOCAL\n     |-- 203.0.113.7\n        /32 host LOCAL\n     |-- 203.0.113.255\n        /32 link BROADCAST\nLocal:\n     |-- 203.0.113.7\n        /32 host LOCAL\n";
        assert_eq!(local_addresses(trie), [Ipv4Addr::new(203, 0, 113, 7)]);
        let table = "00000000000000000000000000000001 01 80 10 80       lo\n20010db8000000000000000000000007 02 40 00 80     eth0\n";
        assert_eq!(interface_addresses(table), ["2001:db8::7".parse::<Ipv6Addr>().unwrap()]);
    }
}
