//! The privileges of the worker: it needs `CAP_NET_ADMIN`, and gives up every other one. No task: `main` calls this once,
//! before there is a second thread.

use anyhow::{Context as _, ensure};
use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::prctl;
use nix::unistd::{Gid, Uid, User, getresgid, getresuid, setgid, setgroups, setuid};

/// The one privilege that changes by netlink need (capabilities(7)).
const NEEDED_CAPABILITY: Capability = Capability::CAP_NET_ADMIN;

/// Drops all privileges but `CAP_NET_ADMIN`, and becomes `user` if one is named. Must be called before there is another
/// thread: each thread has its own privileges.
pub fn keep_only_needed(user: Option<&str>) -> anyhow::Result<()> {
    let (uid, gid) = (getresuid().context("user")?, getresgid().context("group")?);
    ensure!(
        uid.real == uid.effective && gid.real == gid.effective,
        "started setuid or setgid, which would lend its privileges to whoever starts it: take those bits off the file"
    );
    ensure!(
        caps::has_cap(None, CapSet::Effective, NEEDED_CAPABILITY).context("capabilities")?,
        "CAP_NET_ADMIN is missing: run as root, or with AmbientCapabilities=CAP_NET_ADMIN in the systemd unit"
    );
    drop_bounding().context("bounding capabilities")?;
    if let Some(name) = user {
        become_user(name).with_context(|| format!("worker_user {name}"))?;
    }
    drop_others().context("capabilities")?;
    prctl::set_no_new_privs().context("no_new_privs")
}

/// Drops the capabilities that a child process could gain again; only a process that may set capabilities can do that.
fn drop_bounding() -> Result<(), caps::errors::CapsError> {
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        for capability in
            caps::read(None, CapSet::Bounding)?.into_iter().filter(|capability| *capability != NEEDED_CAPABILITY)
        {
            caps::drop(None, CapSet::Bounding, capability)?;
        }
    }
    Ok(())
}

fn become_user(name: &str) -> anyhow::Result<()> {
    let user = User::from_name(name)?.context("there is no such user on this system")?;
    let User { uid, gid, .. } = user;
    if (uid, gid) == (Uid::effective(), Gid::effective()) {
        return Ok(());
    }
    ensure!(Uid::effective().is_root(), "only root can become another user: start it as root, or as that user");
    prctl::set_keepcaps(true)?;
    setgroups(&[])?;
    setgid(gid)?;
    Ok(setuid(uid)?)
}

/// The unit leaves no other privilege, and forbids capset(2).
fn drop_others() -> Result<(), caps::errors::CapsError> {
    let needed = CapsHashSet::from([NEEDED_CAPABILITY]);
    caps::clear(None, CapSet::Ambient)?;
    // The remaining ones have no effect: they would only apply to an executed program with file capabilities.
    let _ = caps::clear(None, CapSet::Inheritable);
    for set in [CapSet::Effective, CapSet::Permitted] {
        if caps::read(None, set)? != needed {
            caps::set(None, set, &needed)?;
        }
    }
    Ok(())
}
