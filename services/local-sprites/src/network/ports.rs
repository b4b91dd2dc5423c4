//! The ports that a Sprite's programs listen on.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use crate::isolation::holder::Holder;

/// The state of a listening socket in `/proc/net/tcp`.
const LISTENING: &str = "0A";

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Port {
    pub port: u16,
    pub address: IpAddr,
    /// As the machine counts.
    pub pid: i32,
}

/// All open ports of a Sprite. On the machine's own network, ports of other processes are left out.
pub fn listening(holder: Holder) -> BTreeSet<Port> {
    let mut sockets = BTreeMap::new();
    for table in ["tcp", "tcp6"] {
        let text = fs::read_to_string(format!("/proc/{}/net/{table}", holder.process.pid))
            .unwrap_or_default();
        sockets.extend(text.lines().skip(1).filter_map(parse));
    }
    let numbers = fs::read_dir("/proc").into_iter().flatten().flatten();
    let processes = numbers
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| holder.contains(*pid));
    let mut ports = BTreeSet::new();
    for pid in processes {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        for link in descriptors.filter_map(|entry| fs::read_link(entry.path()).ok()) {
            let inode = link.to_str().and_then(|text| {
                text.strip_prefix("socket:[")?.strip_suffix(']')?.parse::<u64>().ok()
            });
            // Told once, by the first process that has it.
            if let Some((address, port)) = inode.and_then(|inode| sockets.remove(&inode)) {
                ports.insert(Port { port, address, pid });
            }
        }
    }
    ports
}

/// A line of the kernel's table: the socket's number, and where it listens.
fn parse(line: &str) -> Option<(u64, (IpAddr, u16))> {
    let fields: Vec<_> = line.split_whitespace().collect();
    let (local, state, inode) = (*fields.get(1)?, *fields.get(3)?, *fields.get(9)?);
    let (address, port) = local.split_once(':')?;
    // Words in the machine's own byte order.
    let words: Option<Vec<_>> = (0..address.len() / 8)
        .map(|at| u32::from_str_radix(&address[at * 8..at * 8 + 8], 16).ok())
        .collect();
    let bytes: Vec<_> = words?.into_iter().flat_map(u32::to_ne_bytes).collect();
    let address = match bytes.len() {
        4 => IpAddr::V4(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?)),
        _ => IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?)),
    };
    (state == LISTENING).then_some((
        inode.parse().ok()?,
        (address.to_canonical(), u16::from_str_radix(port, 16).ok()?),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_table_is_read() {
        let line = "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 12345 1 0000 100 0 0 10 0";
        assert_eq!(parse(line), Some((12345, (IpAddr::V4(Ipv4Addr::LOCALHOST), 8080))));
        assert_eq!(parse(&line.replace(" 0A ", " 01 ")), None);
        let six = "   0: 00000000000000000000000001000000:0050 00000000000000000000000000000000:0000 0A 0:0 0:0 0 0 0 7 1";
        assert_eq!(parse(six), Some((7, (IpAddr::V6(Ipv6Addr::LOCALHOST), 80))));
        assert_eq!(parse("nonsense"), None);
    }
}
