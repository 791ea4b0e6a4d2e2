//! The access of a program's user to files. Only a running process is known to have a capability that bypasses file
//! modes: a user alone is not, not even root.

use std::ffi::CString;
use std::fs::{self, Metadata};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::acl::{FileOwner, PosixAcl};
use caps::{CapSet, Capability};
use nix::sys::statvfs::{FsFlags, statvfs};
use nix::unistd::{Gid, Group, Uid, User, getgrouplist, getgroups};

/// The directory of a unit's credentials, which exists only while it runs.
const CREDENTIALS: &str = "/run/credentials/";

/// The access of a user to a file or directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FileAccess {
    /// The user has the needed access.
    Granted,
    /// It does not exist, and the user can create it.
    Creatable,
    /// The user has no access; only this other user has.
    OnlyFor(String),
    /// The user has no access, for this reason.
    Denied(String),
    /// It is a credential: the access can only be checked while the unit runs.
    OnlyWhileRunning,
    /// The caller cannot check the access, for this reason.
    Unknown(String),
}

/// The needed access to a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// To read a file.
    Read,
    /// To list a directory.
    List,
    /// To write; in a directory also to create files.
    Write,
}

/// The user as whom a program serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Its name.
    pub name: String,
    uid: u32,
    groups: Vec<u32>,
    /// The config or the command line names it.
    is_named: bool,
    /// It has the capability to bypass file modes.
    bypasses_file_modes: bool,
}

/// The named user does not exist on this system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownUser {
    /// The name.
    pub name: String,
}

impl Identity {
    /// The user of this name; without a name the caller.
    pub fn named(user: Option<&str>) -> Result<Self, UnknownUser> {
        let Some(name) = user else { return Ok(Self::own()) };
        let found = User::from_name(name).ok().flatten().ok_or_else(|| UnknownUser { name: name.to_owned() })?;
        if found.uid == Uid::effective() {
            return Ok(Self { is_named: true, ..Self::own() });
        }
        Ok(Self {
            name: name.to_owned(),
            uid: found.uid.as_raw(),
            groups: vec![found.gid.as_raw()],
            is_named: true,
            bypasses_file_modes: false,
        })
    }

    /// The user of this name, with all groups that the service manager gives to a unit of this user.
    pub fn of_account(name: &str) -> Result<Self, UnknownUser> {
        Self::of_unit(name, None, &[])
    }

    /// The user of this name, with all groups that the service manager gives to a unit with this `Group=` and these
    /// `SupplementaryGroups=`.
    pub fn of_unit(name: &str, group: Option<&str>, supplementary: &[String]) -> Result<Self, UnknownUser> {
        let identity = Self::named(Some(name))?;
        let Some(primary) = group.and_then(group_id).or(identity.groups.last().copied()) else { return Ok(identity) };
        let listed = CString::new(name).ok().and_then(|name| getgrouplist(&name, Gid::from_raw(primary)).ok());
        let groups = listed.into_iter().flatten().map(Gid::as_raw).chain([primary]);
        let groups = groups.chain(supplementary.iter().filter_map(|group| group_id(group))).collect();
        Ok(Self { groups, ..identity })
    }

    /// The identity of a process: its user, its group and supplementary groups, and whether it has the capability to
    /// bypass file modes (capabilities(7)), as the kernel reports them.
    #[must_use]
    pub fn of_process(pid: u32) -> Option<Self> {
        let identity = Self::in_status(&fs::read_to_string(format!("/proc/{pid}/status")).ok()?)?;
        let process = Some(i32::try_from(pid).ok()?);
        let found = caps::has_cap(process, CapSet::Effective, Capability::CAP_DAC_OVERRIDE);
        Some(Self { bypasses_file_modes: found.unwrap_or(false), ..identity })
    }

    /// The identity in the text of `/proc/PID/status` (`proc_pid_status(5)`): the last of four numbers is for files.
    pub(super) fn in_status(status: &str) -> Option<Self> {
        let numbers = |key: &str| -> Option<Vec<u32>> {
            let line = status.lines().find_map(|line| line.strip_prefix(key))?;
            line.split_whitespace().map(|number| number.parse().ok()).collect()
        };
        let (uid, group) = (*numbers("Uid:")?.last()?, *numbers("Gid:")?.last()?);
        let groups = numbers("Groups:")?.into_iter().chain([group]).collect();
        Some(Self { name: user_name(uid), uid, groups, is_named: true, bypasses_file_modes: false })
    }

    /// Whether it is another user than the caller.
    #[must_use]
    pub fn is_another(&self) -> bool {
        self.uid != Uid::effective().as_raw()
    }

    fn own() -> Self {
        let uid = Uid::effective();
        let others = getgroups().unwrap_or_default();
        let groups = others.into_iter().chain([Gid::effective()]).map(Gid::as_raw).collect();
        Self { name: user_name(uid.as_raw()), uid: uid.as_raw(), groups, is_named: false, bypasses_file_modes: false }
    }

    /// Whether the file's access control list, or else its mode, grants these of the bits 4 (read), 2 (write), 1
    /// (enter).
    fn is_given(&self, path: &Path, metadata: &Metadata, bits: u32) -> bool {
        let owner = FileOwner { user: metadata.uid(), group: metadata.gid() };
        let is_given = || match PosixAcl::of(path) {
            Some(list) => list.grants(self.uid, &self.groups, owner, bits),
            None => self.may(modes(metadata), bits),
        };
        self.bypasses_file_modes || is_given()
    }

    /// Whether the mode grants these of the bits 4 (read), 2 (write), 1 (enter).
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

/// A group by its name or number.
fn group_id(group: &str) -> Option<u32> {
    let named = Group::from_name(group).ok().flatten().map(|group| group.gid.as_raw());
    named.or_else(|| group.parse().ok())
}

/// The access of `user` to `path`.
#[must_use]
pub fn find(path: &Path, user: Result<&Identity, &UnknownUser>, need: Need) -> FileAccess {
    let user = match user {
        Ok(user) => user,
        Err(UnknownUser { name }) => {
            return FileAccess::Denied(format!("there is no user {name} on this system"));
        }
    };
    if path.starts_with(CREDENTIALS) && !path.exists() {
        return FileAccess::OnlyWhileRunning;
    }
    if let Some(dir) = closed_directory(path, user) {
        return FileAccess::Denied(format!("it may not enter {}", dir.display()));
    }
    match fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => missing(path, user, need),
        Err(error) if error.kind() == ErrorKind::PermissionDenied && user.is_another() => {
            FileAccess::Unknown(error.to_string())
        }
        Err(error) => FileAccess::Denied(error.to_string()),
        Ok(metadata) => by_mode(path, &metadata, user, need),
    }
}

/// The uppermost directory above `path` that `user` may not enter.
fn closed_directory<'a>(path: &'a Path, user: &Identity) -> Option<&'a Path> {
    let is_closed = |dir: &&Path| fs::metadata(dir).is_ok_and(|metadata| !user.is_given(dir, &metadata, 1));
    path.ancestors().skip(1).filter(is_closed).last()
}

/// The access of `user` by the owner and the mode of the file, of which this is the metadata.
fn by_mode(path: &Path, metadata: &Metadata, user: &Identity, need: Need) -> FileAccess {
    let bits = match need {
        Need::Read => 4,
        Need::List => 5,
        Need::Write if metadata.is_dir() => 3,
        Need::Write => 6,
    };
    if need == Need::Write && is_read_only(path) {
        return FileAccess::Denied("the file system is read-only".into());
    }
    let (owner, _, mode) = modes(metadata);
    if user.is_given(path, metadata, bits) {
        return FileAccess::Granted;
    }
    if !user.is_named && owner != user.uid && mode >> 6 & bits == bits {
        return FileAccess::OnlyFor(user_name(owner));
    }
    FileAccess::Denied(format!(
        "{} belongs to {} and has the mode {:o}",
        path.display(),
        user_name(owner),
        mode & 0o7777
    ))
}

/// A missing directory is created by the program, if its user may do that.
fn missing(path: &Path, user: &Identity, need: Need) -> FileAccess {
    let above = path.ancestors().skip(1).find_map(|dir| Some((dir, fs::metadata(dir).ok()?)));
    match above {
        Some((dir, metadata)) if need == Need::Write && (!user.is_given(dir, &metadata, 3) || is_read_only(dir)) => {
            FileAccess::Denied(format!("it is missing, and may not be made in {}", dir.display()))
        }
        _ => FileAccess::Creatable,
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
        Identity { name: "wgkex".into(), uid, groups: groups.into(), is_named: true, bypasses_file_modes: false }
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
    fn a_process_has_the_groups_that_the_kernel_says_and_not_those_of_its_account() {
        let status = "Name:\twgkex-broker\nUid:\t1\t1\t1\t4001\nGid:\t2\t2\t2\t4002\nFDSize:\t64\nGroups:\t7 4007 \n";
        let found = Identity::in_status(status).unwrap();
        assert_eq!((found.name.as_str(), found.uid, &found.groups[..]), ("4001", 4001, &[7, 4007, 4002][..]));
        assert!(found.is_another());
        assert_eq!(Identity::in_status("Name:\tx\n"), None);
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
        let may = |user: &Identity| find(dir.path(), Ok(user), Need::Write) == FileAccess::Granted;
        assert!(!may(&found) && may(&Identity { bypasses_file_modes: true, ..found }), "with CAP_DAC_OVERRIDE");
        let own = Identity::of_process(std::process::id()).unwrap();
        assert!(!own.is_another() && own.name == Identity::own().name);
        let has_capability = caps::has_cap(None, CapSet::Effective, Capability::CAP_DAC_OVERRIDE).unwrap();
        assert_eq!(own.bypasses_file_modes, has_capability);
    }

    #[test]
    fn a_unit_has_its_groups_beside_those_of_its_account() {
        let name = Identity::own().name;
        let unit = Identity::of_unit(&name, Some("4711"), &["4712".into(), "no such group".into()]).unwrap();
        assert!([4711, 4712].iter().all(|group| unit.groups.contains(group)), "{unit:?}");
    }

    #[test]
    fn a_list_of_the_file_counts_more_than_its_mode() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let file = dir.path().join("key.pem");
        fs::write(&file, "x").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        let other = user(4711, &[4711]);
        assert!(matches!(find(&file, Ok(&other), Need::Read), FileAccess::Denied(_)));
        crate::doctor::acl::tests::let_read(&file, 4711);
        assert_eq!(find(&file, Ok(&other), Need::Read), FileAccess::Granted);
        assert!(matches!(find(&file, Ok(&user(4712, &[4711])), Need::Read), FileAccess::Denied(_)));
    }

    #[test]
    fn a_credential_of_a_unit_that_does_not_run_is_not_judged() {
        let credential = Path::new("/run/credentials/no-such-unit.service/key.pem");
        assert_eq!(find(credential, Ok(&user(1, &[1])), Need::Read), FileAccess::OnlyWhileRunning);
    }

    #[test]
    fn what_is_there_is_judged_by_its_mode_and_what_is_not_by_what_is_above() {
        let dir = tempfile::tempdir().unwrap();
        let own = Identity { is_named: true, ..Identity::own() };
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("state")).unwrap();
        assert_eq!(find(&at("state"), Ok(&own), Need::Write), FileAccess::Granted);
        assert_eq!(find(&at("state/new/er"), Ok(&own), Need::Write), FileAccess::Creatable);
        assert_eq!(find(&at("list"), Ok(&own), Need::Read), FileAccess::Creatable);
        fs::set_permissions(at("state"), fs::Permissions::from_mode(0o500)).unwrap();
        assert!(
            matches!(find(&at("state"), Ok(&own), Need::Write), FileAccess::Denied(reason) if reason.contains("mode 500"))
        );
        assert!(matches!(find(&at("state/new"), Ok(&own), Need::Write), FileAccess::Denied(_)));
        assert_eq!(find(&at("state"), Ok(&own), Need::List), FileAccess::Granted);
        fs::set_permissions(at("state"), fs::Permissions::from_mode(0o600)).unwrap();
        assert!(
            matches!(find(&at("state/x"), Ok(&own), Need::Read), FileAccess::Denied(reason) if reason.contains("enter"))
        );
        let unknown = Identity::named(Some("no such user")).unwrap_err();
        assert!(
            matches!(find(&at("state"), Err(&unknown), Need::Read), FileAccess::Denied(reason) if reason.contains("no such user"))
        );
    }
}
