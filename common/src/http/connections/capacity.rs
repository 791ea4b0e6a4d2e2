//! How many connections there is room for, by the files that may be open.

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tracing::warn;

/// The most open connections: twice what 3,300 routers need; an idle one takes about 12 KiB.
const MAX_OPEN: usize = 8_192;
/// The most of one client: more than routers behind one address have at the same time.
pub(super) const MAX_OF_CLIENT: usize = 1_024;
/// The most upgraded ones: twice as many as 500 tenants of ten members need.
const MAX_UPGRADED: usize = 10_000;
/// What all of them may hold beyond that, in bytes: answers that are not read, and heads that do not end.
const MAX_HELD: usize = 16 << 20;
/// The most connections of a server that are not in the table yet, TLS handshakes among them.
const MAX_PENDING: usize = 1_024;
/// Files that the rest of the program has open.
const FILES: usize = 256;

/// How many connections there is room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Open ones.
    pub open: usize,
    /// Of them, those of one client.
    pub of_client: usize,
    /// Those of a server that are not in the table yet.
    pub pending: usize,
    /// Upgraded ones, beside those.
    pub upgraded: usize,
    /// What all may hold, in bytes.
    pub held: usize,
}

impl Capacity {
    /// Of a listener for a few clients.
    pub const FEW: Self = Self { open: 32, of_client: 16, pending: 16, upgraded: 0, held: 4 << 20 };

    /// Of a listener for a fleet. As many files may be open from now on as the system lets this program have.
    #[must_use]
    pub fn of_fleet() -> Self {
        Self::of_files(open_files())
    }

    /// The same, of a listener that has upgraded connections, too.
    #[must_use]
    pub fn of_fleet_and_upgraded() -> Self {
        let files = open_files();
        let of_files = Self::of_files(files);
        of_files.and_upgraded(files)
    }

    /// Of a listener for a fleet where so many files may be open. Each connection has two files, and a quarter of them may
    /// come by HTTPS beside that; and both servers have some that arrive.
    #[must_use]
    pub fn of_files(files: usize) -> Self {
        let pending = (files / 8).clamp(16, MAX_PENDING);
        let open = (files.saturating_sub(FILES + 2 * pending) / 9 * 4).clamp(64, MAX_OPEN);
        Self { open, of_client: MAX_OF_CLIENT, pending, upgraded: 0, held: MAX_HELD }
    }

    /// With upgraded connections, of two files each. Where files are few, HTTP keeps three of seven: at 20,000 that is enough
    /// for 3,300 routers and 5,000 members of tenants.
    fn and_upgraded(self, files: usize) -> Self {
        let files = files.saturating_sub(FILES + 2 * self.pending);
        let open = self.open.min(files / 7 * 3 / 9 * 4).max(64);
        let upgraded = (files.saturating_sub(open * 9 / 4) / 2).clamp(16, MAX_UPGRADED);
        Self { open, upgraded, ..self }
    }
}

/// Raises the number of files that may be open to what the system allows; returns that number.
fn open_files() -> usize {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        // A unit may forbid the call.
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
