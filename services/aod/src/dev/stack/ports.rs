//! The ports of a stack.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};

use crate::dev::DevError;

/// Ports for one stack. Its services may be started again at any time, and their ports are free
/// meanwhile: so a stack has a block of ports to itself, for as long as it holds the block's first.
/// Not from the range that the kernel gives to outgoing connections.
pub struct Ports {
    _block: TcpListener,
    pub addrs: Vec<SocketAddr>,
}

impl Ports {
    const FIRST: u16 = 20_000;
    const BLOCK: u16 = 128;
    const BLOCKS: u32 = 80;
    const ATTEMPTS: u32 = 400;

    pub fn claim(count: usize) -> Result<Self, DevError> {
        for _ in 0..Self::ATTEMPTS {
            let number = getrandom::u32().map_err(DevError::broken)? % Self::BLOCKS;
            let first = Self::FIRST + u16::try_from(number).unwrap_or_default() * Self::BLOCK;
            let Ok(block) = TcpListener::bind((Ipv4Addr::LOCALHOST, first)) else { continue };
            // A process that knows nothing of blocks may have taken one.
            let free = |port: &u16| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok();
            let addrs = (first + 1..first + Self::BLOCK)
                .filter(free)
                .take(count)
                .map(|port| (Ipv4Addr::LOCALHOST, port).into());
            let addrs: Vec<SocketAddr> = addrs.collect();
            if addrs.len() == count {
                return Ok(Self { _block: block, addrs });
            }
        }
        Err(DevError::Broken("no free ports".to_owned()))
    }
}
