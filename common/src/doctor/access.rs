//! What a program's user may do with files. It has no capability that lets it pass over modes, not even as root.

use std::ffi::CString;
use std::fs::{self, Metadata};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use nix::sys::statvfs::{FsFlags, statvfs};
use nix::unistd::{Gid, Uid, User, getgrouplist, getgroups};

/// What a user may do with a file or directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Access {
    /// What is needed.
    Granted,
    /// It is not there, and can be made.
    Creatable,
    /// Not that; only this other user may.
    OnlyFor(String),
    /// Not that, for this reason.
    Denied(String),
}

/// What is to be done with a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// To read a file.
    Read,
    /// To read what is in a directory.
    List,
    /// To write, in a directory also to make files.
    Write,
}

/// As whom a program serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Its name.
    pub name: String,
    uid: u32,
    groups: Vec<u32>,
    /// The config or the command line names it.
    is_named: bool,
}

/// A user is named whom this system does not know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unknown {
    /// The name.
    pub name: String,
}

impl Identity {
    /// The user of this name, or who runs this.
    pub fn named(user: Option<&str>) -> Result<Self, Unknown> {
        let Some(name) = user else { return Ok(Self::own()) };
        let found = User::from_name(name).ok().flatten().ok_or_else(|| Unknown { name: name.to_owned() })?;
        if found.uid == Uid::effective() {
            return Ok(Self { is_named: true, ..Self::own() });
        }
        Ok(Self { name: name.to_owned(), uid: found.uid.as_raw(), groups: vec![found.gid.as_raw()], is_named: true })
    }

    /// The user of this name, with all groups that the service manager gives to a unit of this user.
    pub fn of_account(name: &str) -> Result<Self, Unknown> {
        let identity = Self::named(Some(name))?;
        let listed = CString::new(name).ok().and_then(|name| {
            let gid = identity.groups.last().copied()?;
            getgrouplist(&name, Gid::from_raw(gid)).ok()
        });
        let groups = listed.into_iter().flatten().map(Gid::as_raw).chain(identity.groups.iter().copied()).collect();
        Ok(Self { groups, ..identity })
    }

    /// The user with this number.
    #[must_use]
    pub fn of_process(uid: u32) -> Self {
        let name = user_name(uid);
        let nameless = Self { name: name.clone(), uid, groups: Vec::new(), is_named: true };
        Self::of_account(&name).unwrap_or(nameless)
    }

    fn own() -> Self {
        let uid = Uid::effective();
        let others = getgroups().unwrap_or_default();
        let groups = others.into_iter().chain([Gid::effective()]).map(Gid::as_raw).collect();
        Self { name: user_name(uid.as_raw()), uid: uid.as_raw(), groups, is_named: false }
    }

    /// Whether the mode gives it these of the bits 4 (read), 2 (write), 1 (enter).
    fn may(&self, (owner, group, mode): (u32, u32, u32), bits: u32) -> bool {
        let shift = if owner == self.uid {
            6
        } else if self.groups.contains(&group) {
            3
        } else {
            0
        };
        mode >> shift & bits == bits
    }
}

fn user_name(uid: u32) -> String {
    let known = User::from_uid(Uid::from_raw(uid)).ok().flatten();
    known.map_or_else(|| uid.to_string(), |user| user.name)
}

/// Whether `user` may do that with `path`.
#[must_use]
pub fn find(path: &Path, user: Result<&Identity, &Unknown>, need: Need) -> Access {
    let user = match user {
        Ok(user) => user,
        Err(Unknown { name }) => {
            return Access::Denied(format!("there is no user {name} on this system"));
        }
    };
    for dir in path.ancestors().skip(1).collect::<Vec<_>>().into_iter().rev() {
        let Ok(metadata) = fs::metadata(dir) else { continue };
        if !user.may(modes(&metadata), 1) {
            return Access::Denied(format!("it may not enter {}", dir.display()));
        }
    }
    let metadata = match fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return missing(path, user, need),
        Err(error) => return Access::Denied(error.to_string()),
        Ok(metadata) => metadata,
    };
    let bits = match need {
        Need::Read => 4,
        Need::List => 5,
        Need::Write if metadata.is_dir() => 3,
        Need::Write => 6,
    };
    if need == Need::Write && is_read_only(path) {
        return Access::Denied("the file system is read-only".into());
    }
    let modes @ (owner, _, mode) = modes(&metadata);
    if user.may(modes, bits) {
        return Access::Granted;
    }
    if !user.is_named && owner != user.uid && mode >> 6 & bits == bits {
        return Access::OnlyFor(user_name(owner));
    }
    Access::Denied(format!("{} belongs to {} and has the mode {:o}", path.display(), user_name(owner), mode & 0o7777))
}

/// A directory that is missing is made, if that may be.
fn missing(path: &Path, user: &Identity, need: Need) -> Access {
    let above = path.ancestors().skip(1).find_map(|dir| Some((dir, fs::metadata(dir).ok()?)));
    match above {
        Some((dir, metadata)) if need == Need::Write && (!user.may(modes(&metadata), 3) || is_read_only(dir)) => {
            Access::Denied(format!("it is missing, and may not be made in {}", dir.display()))
        }
        _ => Access::Creatable,
    }
}

fn modes(metadata: &Metadata) -> (u32, u32, u32) {
    (metadata.uid(), metadata.gid(), metadata.mode())
}

fn is_read_only(path: &Path) -> bool {
    statvfs(path).is_ok_and(|status| status.flags().contains(FsFlags::ST_RDONLY))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn user(uid: u32, groups: &[u32]) -> Identity {
        Identity { name: "wgkex".into(), uid, groups: groups.into(), is_named: true }
    }

    #[test]
    fn the_most_special_class_of_a_mode_counts_and_root_is_no_exception() {
        for (user, mode, bits, may) in [
            (user(0, &[0]), (0, 0, 0o500), 2, false),
            (user(0, &[0]), (1, 1, 0o700), 2, false),
            (user(1, &[2]), (1, 2, 0o700), 3, true),
            (user(1, &[2]), (1, 2, 0o077), 2, false),
            (user(1, &[2]), (3, 2, 0o070), 3, true),
            (user(1, &[2]), (3, 4, 0o007), 3, true),
            (user(1, &[2]), (3, 4, 0o770), 1, false),
        ] {
            assert_eq!(user.may(mode, bits), may, "{user:?} {mode:?} {bits}");
        }
    }

    #[test]
    fn what_is_there_is_judged_by_its_mode_and_what_is_not_by_what_is_above() {
        let dir = tempfile::tempdir().unwrap();
        let own = Identity { is_named: true, ..Identity::own() };
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("state")).unwrap();
        assert_eq!(find(&at("state"), Ok(&own), Need::Write), Access::Granted);
        assert_eq!(find(&at("state/new/er"), Ok(&own), Need::Write), Access::Creatable);
        assert_eq!(find(&at("list"), Ok(&own), Need::Read), Access::Creatable);
        fs::set_permissions(at("state"), fs::Permissions::from_mode(0o500)).unwrap();
        assert!(
            matches!(find(&at("state"), Ok(&own), Need::Write), Access::Denied(reason) if reason.contains("mode 500"))
        );
        assert!(matches!(find(&at("state/new"), Ok(&own), Need::Write), Access::Denied(_)));
        assert_eq!(find(&at("state"), Ok(&own), Need::List), Access::Granted);
        fs::set_permissions(at("state"), fs::Permissions::from_mode(0o600)).unwrap();
        assert!(
            matches!(find(&at("state/x"), Ok(&own), Need::Read), Access::Denied(reason) if reason.contains("enter"))
        );
        let unknown = Identity::named(Some("no such user")).unwrap_err();
        assert!(
            matches!(find(&at("state"), Err(&unknown), Need::Read), Access::Denied(reason) if reason.contains("no such user"))
        );
    }
}
