//! Sockets in the network namespace of a Sprite.

use std::{io, net::SocketAddr};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::net::{TcpSocket, TcpStream};

/// Makes a socket in a process's network namespace. Sockets stay in the namespace that they were
/// made in.
pub fn inside<T: Send + 'static>(
    pid: i32,
    make: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let namespace = std::fs::File::open(format!("/proc/{pid}/ns/net"))?;
    let make = move || {
        move_into_link_name_space(
            std::os::fd::AsFd::as_fd(&namespace),
            Some(LinkNameSpaceType::Network),
        )?;
        make()
    };
    // A thread of its own: it stays in that namespace, and ends.
    std::thread::spawn(make)
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("the namespace cannot be entered")))
}

/// Connects from inside of a process's network namespace. Only the socket is made there: a
/// connection that stands still takes no thread.
pub async fn connect_inside(pid: i32, address: SocketAddr) -> io::Result<TcpStream> {
    let make = move || {
        inside(
            pid,
            move || if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() },
        )
    };
    tokio::task::spawn_blocking(make).await.map_err(io::Error::other)??.connect(address).await
}

#[cfg(test)]
mod tests {
    use std::{net::Ipv4Addr, time::Duration};

    use tokio::task::JoinSet;

    use super::*;

    #[test]
    fn connections_that_stand_still_take_no_thread_of_the_runtime() {
        let pid = i32::try_from(std::process::id()).unwrap();
        // Only root enters a namespace.
        if inside(pid, || Ok(())).is_err() {
            return;
        }
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .max_blocking_threads(1)
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let socket = TcpSocket::new_v4().unwrap();
            socket.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
            let listener = socket.listen(1).unwrap();
            let address = listener.local_addr().unwrap();
            let mut accepted = Vec::new();
            while let Ok(Ok(stream)) =
                tokio::time::timeout(Duration::from_millis(300), TcpStream::connect(address)).await
            {
                accepted.push(stream);
            }
            let mut waiting = JoinSet::new();
            for _ in 0..4 {
                waiting.spawn(connect_inside(pid, address));
            }
            tokio::task::yield_now().await;
            let work = async {
                for _ in 0..8 {
                    tokio::task::spawn_blocking(|| ()).await.unwrap();
                }
            };
            assert!(tokio::time::timeout(Duration::from_secs(10), work).await.is_ok());
            let another = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
            assert!(connect_inside(pid, another.local_addr().unwrap()).await.is_ok());
        });
    }
}
