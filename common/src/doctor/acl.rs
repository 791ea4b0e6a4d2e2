//! POSIX access control lists, in the kernel's format of an extended attribute (acl(5), `linux/posix_acl_xattr.h`).

use std::path::Path;

use rustix::fs::getxattr;

const ATTRIBUTE: &str = "system.posix_acl_access";
const VERSION: u32 = 2;
/// More than any file system stores.
const ATTRIBUTE_SIZE_MAX: usize = 1 << 16;

const OWNER: u16 = 0x01;
const USER: u16 = 0x02;
const OWNING_GROUP: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

/// The list of one file.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct PosixAcl(Vec<AclEntry>);

#[derive(Debug, PartialEq, Eq)]
struct AclEntry {
    tag: u16,
    bits: u32,
    id: u32,
}

/// The owner and the group of a file.
#[derive(Debug, Clone, Copy)]
pub(super) struct FileOwner {
    pub(super) user: u32,
    pub(super) group: u32,
}

impl PosixAcl {
    /// The list of a file; none if its mode is all that applies.
    pub(super) fn of(path: &Path) -> Option<Self> {
        let mut bytes = vec![0; ATTRIBUTE_SIZE_MAX];
        let size = getxattr(path, ATTRIBUTE, &mut bytes[..]).ok()?;
        Self::parse(bytes.get(..size)?)
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let (version, entries) = bytes.split_first_chunk()?;
        let entry = |entry: &[u8]| match *entry {
            [t0, t1, b0, b1, i0, i1, i2, i3] => Some(AclEntry {
                tag: u16::from_le_bytes([t0, t1]),
                bits: u16::from_le_bytes([b0, b1]).into(),
                id: u32::from_le_bytes([i0, i1, i2, i3]),
            }),
            _ => None,
        };
        let entries = entries.chunks(8).map(entry).collect::<Option<_>>()?;
        (u32::from_le_bytes(*version) == VERSION).then_some(Self(entries))
    }

    /// Whether the list grants a user with these groups these of the bits 4 (read), 2 (write), 1 (enter), by the
    /// kernel's rules.
    pub(super) fn grants(&self, uid: u32, groups: &[u32], owner: FileOwner, bits: u32) -> bool {
        let has = |given: u32| given & bits == bits;
        let first = |tag| self.0.iter().find(|entry| entry.tag == tag).map(|entry| entry.bits);
        if uid == owner.user {
            return first(OWNER).is_some_and(has);
        }
        let mask = first(MASK).unwrap_or(7);
        if let Some(user) = self.0.iter().find(|entry| entry.tag == USER && entry.id == uid) {
            return has(user.bits & mask);
        }
        let is_of_group = |entry: &&AclEntry| match entry.tag {
            OWNING_GROUP => groups.contains(&owner.group),
            GROUP => groups.contains(&entry.id),
            _ => false,
        };
        let mut of_groups = self.0.iter().filter(is_of_group).peekable();
        if of_groups.peek().is_some() {
            return of_groups.any(|entry| has(entry.bits & mask));
        }
        first(OTHER).is_some_and(has)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use rustix::fs::{XattrFlags, setxattr};

    use super::*;

    const NOBODY: u32 = u32::MAX;

    /// An attribute with these entries: the tag, the bits and the id.
    fn bytes(entries: &[(u16, u16, u32)]) -> Vec<u8> {
        let entry = |(tag, bits, id): &(u16, u16, u32)| {
            [&tag.to_le_bytes()[..], &bits.to_le_bytes(), &id.to_le_bytes()].concat()
        };
        [VERSION.to_le_bytes().to_vec(), entries.iter().flat_map(entry).collect()].concat()
    }

    /// Sets the list of a file of mode 600 so that one more user may read it.
    pub fn let_read(path: &Path, uid: u32) {
        let entries =
            [(OWNER, 6, NOBODY), (USER, 4, uid), (OWNING_GROUP, 0, NOBODY), (MASK, 4, NOBODY), (OTHER, 0, NOBODY)];
        setxattr(path, ATTRIBUTE, &bytes(&entries), XattrFlags::empty()).unwrap();
    }

    #[test]
    fn the_first_kind_of_entry_that_is_for_the_user_counts() {
        let list = PosixAcl::parse(&bytes(&[
            (OWNER, 6, NOBODY),
            (USER, 7, 10),
            (USER, 0, 11),
            (OWNING_GROUP, 4, NOBODY),
            (GROUP, 6, 20),
            (MASK, 5, NOBODY),
            (OTHER, 1, NOBODY),
        ]))
        .unwrap();
        let owner = FileOwner { user: 1, group: 2 };
        for (uid, groups, bits, grants) in [
            (1, &[][..], 6, true),
            (1, &[20], 1, false),
            (10, &[], 5, true),
            (10, &[], 2, false),
            (11, &[2, 20], 4, false),
            (12, &[2], 4, true),
            (12, &[20], 4, true),
            (12, &[20], 2, false),
            (12, &[2, 20], 1, false),
            (12, &[21], 1, true),
            (12, &[21], 4, false),
        ] {
            assert_eq!(list.grants(uid, groups, owner, bits), grants, "{uid} {groups:?} {bits}");
        }
    }

    #[test]
    fn what_is_no_list_is_none() {
        for text in [&b""[..], b"\x02\0\0\0\x01", b"\x03\0\0\0", b"\x02\0\0"] {
            assert_eq!(PosixAcl::parse(text), None, "{text:?}");
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(PosixAcl::of(file.path()), None);
        assert_eq!(PosixAcl::of(Path::new("/no/such/file")), None);
    }
}
