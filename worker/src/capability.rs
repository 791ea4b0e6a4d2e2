//! What the worker may do, said before it tries.

use anyhow::{Context as _, ensure};

/// The bit of `CAP_NET_ADMIN` (linux/capability.h).
const NET_ADMIN: u32 = 12;

/// An error that names the capability if `status`, the text of `/proc/self/status`, does not have it in effect.
pub fn check(status: &str) -> anyhow::Result<()> {
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).map(str::trim);
    let effective =
        effective.and_then(|hex| u64::from_str_radix(hex, 16).ok()).context("no CapEff in /proc/self/status")?;
    ensure!(
        effective & 1 << NET_ADMIN != 0,
        "CAP_NET_ADMIN is missing: run as root, or with AmbientCapabilities=CAP_NET_ADMIN in the systemd unit"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_missing_capability_is_named() {
        assert!(check("Name:\tx\nCapEff:\t0000000000001000\n").is_ok());
        assert!(check("CapEff:\t000001ffffffffff\n").is_ok());
        let error = check("CapEff:\t000001ffffffefff\n").unwrap_err().to_string();
        assert!(error.contains("CAP_NET_ADMIN"), "{error}");
        assert!(check("").is_err());
    }
}
