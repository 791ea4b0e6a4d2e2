//! The limits of connections, by the limit of open files.

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tracing::warn;

/// The most open connections: twice the need of 3,300 routers; an idle one takes about 12 KiB.
const OPEN_MAX: usize = 8_192;
/// The most connections of one client: more than routers behind one address have at the same time.
pub(super) const OF_CLIENT_MAX: usize = 1_024;
/// The most upgraded connections: twice the need of 500 tenants of ten members.
const UPGRADED_MAX: usize = 10_000;
/// The most memory that all of them may hold beyond that, in bytes: unread responses, and heads without an end.
const BUFFERED_MAX: usize = 16 << 20;
/// The most connections of a server without an entry in the table, such as TLS handshakes.
const PENDING_MAX: usize = 1_024;
/// Files that the rest of the program opens.
const OTHER_FILES: usize = 256;

/// The limits of connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Open connections that are not upgraded.
    pub open: usize,
    /// Those of one client.
    pub of_client: usize,
    /// Connections of a server without an entry in the table.
    pub pending: usize,
    /// Upgraded connections, in addition.
    pub upgraded: usize,
    /// The memory that all may hold, in bytes.
    pub buffered: usize,
}

impl Capacity {
    /// For a listener for a few clients.
    pub const FEW: Self = Self { open: 32, of_client: 16, pending: 16, upgraded: 0, buffered: 4 << 20 };

    /// For a listener for a fleet. Raises the limit of open files to the hard limit.
    #[must_use]
    pub fn of_fleet() -> Self {
        Self::of_files(open_files())
    }

    /// The same for a listener with upgraded connections.
    #[must_use]
    pub fn of_fleet_and_upgraded() -> Self {
        let files = open_files();
        let of_files = Self::of_files(files);
        of_files.and_upgraded(files)
    }

    /// For a listener for a fleet with this limit of open files. Each connection needs two files; a quarter of them may
    /// use HTTPS in addition; and both servers have pending ones.
    #[must_use]
    pub fn of_files(files: usize) -> Self {
        let pending = (files / 8).clamp(16, PENDING_MAX);
        let open = (files.saturating_sub(OTHER_FILES + 2 * pending) / 9 * 4).clamp(64, OPEN_MAX);
        Self { open, of_client: OF_CLIENT_MAX, pending, upgraded: 0, buffered: BUFFERED_MAX }
    }

    /// Adds upgraded connections, of two files each. If there are few files, HTTP gets three of seven: with 20,000
    /// files that is enough for 3,300 routers and 5,000 members of tenants.
    fn and_upgraded(self, files: usize) -> Self {
        let files = files.saturating_sub(OTHER_FILES + 2 * self.pending);
        let open = self.open.min(files / 7 * 3 / 9 * 4).max(64);
        let upgraded = (files.saturating_sub(open * 9 / 4) / 2).clamp(16, UPGRADED_MAX);
        Self { open, upgraded, ..self }
    }
}

/// Raises the limit of open files to the hard limit; returns the limit.
fn open_files() -> usize {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        // A unit may forbid the system call.
        if soft < hard {
            setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        }
        Ok(hard)
    });
    let files = raised.or_else(|error| {
        warn!(%error, "the limit of open files cannot be raised");
        getrlimit(Resource::RLIMIT_NOFILE).map(|(soft, _)| soft)
    });
    usize::try_from(files.unwrap_or_default()).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_of_open_files_bounds_the_connections() {
        let files = [0, 1_024, 4_096, 20_000, 1_048_576];
        assert_eq!(files.map(|files| Capacity::of_files(files).open), [64, 224, 1_248, 7_864, 8_192]);
        let both = files.map(|files| {
            let Capacity { open, upgraded, .. } = Capacity::of_files(files).and_upgraded(files);
            (open, upgraded)
        });
        assert_eq!(both, [(64, 16), (96, 148), (536, 805), (3_368, 5_059), (8_192, 10_000)]);
    }
}
