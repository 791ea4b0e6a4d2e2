//! The WireGuard part of an interface, of the kernel or of a userspace one, by wireguard-control.

use std::io::{self, ErrorKind};
use std::net::{Ipv6Addr, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use tokio::time::{Instant, sleep};
use wireguard_control::{Backend, Device, DeviceUpdate, InterfaceName, Key};

/// How long a userspace WireGuard may take to start or to end.
const USERSPACE_TIMEOUT: Duration = Duration::from_secs(10);

/// Reads the interface, its peers included. It must exist.
pub async fn get(name: &str, backend: Backend) -> io::Result<Device> {
    let name: InterfaceName = name.parse()?;
    blocking(move || Device::get(&name, backend)).await
}

/// Gives the interface its key. It must exist: wireguard-control would make a missing one.
pub async fn set_key(name: &str, backend: Backend, key: Key) -> io::Result<()> {
    set(name, backend, DeviceUpdate::new().set_private_key(key)).await
}

/// Gives the interface its UDP port. It must exist.
pub async fn set_port(name: &str, backend: Backend, port: u16) -> io::Result<()> {
    if backend == Backend::Userspace {
        // wireguard-go only logs, when it is set up, that the port is taken.
        UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port))?;
    }
    set(name, backend, DeviceUpdate::new().set_listen_port(port)).await
}

async fn set(name: &str, backend: Backend, update: DeviceUpdate) -> io::Result<()> {
    let name: InterfaceName = name.parse()?;
    blocking(move || update.apply(&name, backend)).await
}

async fn blocking<T: Send + 'static>(call: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(call).await.unwrap_or_else(|panic| Err(io::Error::other(panic)))
}

/// The directory of the control sockets of userspace WireGuard processes. All network namespaces share it.
#[must_use]
pub fn socket(name: &str) -> PathBuf {
    format!("/var/run/wireguard/{name}.sock").into()
}

/// Whether a userspace WireGuard of this name listens.
#[must_use]
pub fn listens(name: &str) -> bool {
    UnixStream::connect(socket(name)).is_ok()
}

/// Whether the interface may belong to a userspace WireGuard whose control socket this process may not open.
#[must_use]
pub fn is_socket_inaccessible(name: &str) -> bool {
    UnixStream::connect(socket(name)).is_err_and(|error| error.kind() == ErrorKind::PermissionDenied)
}

/// Starts wireguard-go for an interface that does not exist yet; returns when it accepts commands. It daemonizes
/// itself. [`ErrorKind::NotFound`]: the program is not installed.
pub async fn start_userspace(name: &str) -> io::Result<()> {
    let until = Instant::now() + USERSPACE_TIMEOUT;
    // With a log level it would keep our output open for as long as it runs.
    let mut program = Command::new("wireguard-go");
    program.arg(name).env_remove("LOG_LEVEL").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let output = blocking(move || program.output()).await?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let reason = said.lines().last().unwrap_or("it gives no reason");
        return Err(io::Error::other(format!("wireguard-go: {reason}")));
    }
    wait(until, "wireguard-go does not open its control socket", || listens(name)).await
}

/// Waits for the userspace WireGuard of a deleted interface to end, so that its name is free again.
pub async fn ended(name: &str) -> io::Result<()> {
    wait(Instant::now() + USERSPACE_TIMEOUT, "its control socket stays open", || !listens(name)).await
}

async fn wait(until: Instant, failure: &'static str, condition: impl Fn() -> bool) -> io::Result<()> {
    while !condition() {
        if Instant::now() > until {
            return Err(io::Error::new(ErrorKind::TimedOut, failure));
        }
        sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}
