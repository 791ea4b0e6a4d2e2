//! As whom the broker serves: by its process, or by its unit.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::unistd::Uid;
use wgkex_common::doctor::access::{Identity, Unknown};

/// Where units are, the first counts.
const UNITS: [&str; 4] = ["etc/systemd/system", "run/systemd/system", "usr/lib/systemd/system", "lib/systemd/system"];
const UNIT: &str = "wgkex-broker.service";

/// The user who is `named`; else that of the process `pid`; else, for root, who would not start it as itself, that of its
/// unit; else who runs this.
pub(super) fn find(named: Option<&str>, pid: Option<u32>) -> Result<Identity, Unknown> {
    if let Some(name) = named {
        return Identity::of_account(name);
    }
    if let Some(process) = pid.and_then(|pid| fs::metadata(format!("/proc/{pid}")).ok()) {
        return Ok(Identity::of_process(process.uid()));
    }
    match unit_user(Path::new("/")) {
        Some(name) if Uid::effective().is_root() => Identity::of_account(&name),
        Some(_) | None => Identity::named(None),
    }
}

/// The user whom the broker's unit names, with what is added to it.
fn unit_user(root: &Path) -> Option<String> {
    let dirs = UNITS.map(|dir| root.join(dir));
    let unit = dirs.iter().find_map(|dir| fs::read_to_string(dir.join(UNIT)).ok())?;
    let mut added: Vec<PathBuf> = dirs
        .iter()
        .filter_map(|dir| fs::read_dir(dir.join(format!("{UNIT}.d"))).ok())
        .flat_map(|entries| entries.flatten().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "conf"))
        .collect();
    added.sort_by(|one, other| one.file_name().cmp(&other.file_name()));
    let texts = added.iter().filter_map(|path| fs::read_to_string(path).ok());
    [unit].into_iter().chain(texts).filter_map(|text| user_in(&text)).next_back().filter(|user| !user.is_empty())
}

/// The last `User=` of a unit; an empty one takes back those before.
fn user_in(unit: &str) -> Option<String> {
    unit.lines().filter_map(|line| line.trim().strip_prefix("User=")).next_back().map(|user| user.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_user_counts_that_a_unit_or_an_addition_names() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(unit_user(root.path()), None);
        let write = |file: &str, text: &str| {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("usr/lib/systemd/system/wgkex-broker.service", "[Service]\nUser=wgkex\nGroup=other\n");
        assert_eq!(unit_user(root.path()).as_deref(), Some("wgkex"));
        write("etc/systemd/system/wgkex-broker.service.d/20-user.conf", "[Service]\n User=broker\n");
        write("run/systemd/system/wgkex-broker.service.d/10-user.conf", "[Service]\nUser=early\n");
        write("etc/systemd/system/wgkex-broker.service.d/30-user.txt", "User=ignored\n");
        assert_eq!(unit_user(root.path()).as_deref(), Some("broker"));
        write("etc/systemd/system/wgkex-broker.service.d/90.conf", "[Service]\nUser=\n");
        assert_eq!(unit_user(root.path()), None);
    }
}
