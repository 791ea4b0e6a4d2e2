//! The tenants' addresses on disk, for the members' return after a restart. A restart begins the grace time anew.
//!
//! The task of [`AddressStore`] writes behind; [`crate::tenants::service`] notes the changes.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;

use rusqlite::{Connection, Row, Transaction, params};
use wgkex_common::PublicKey;
use wgkex_common::storage::schema::Schema;
use wgkex_common::storage::versions::StateFile;
use wgkex_common::storage::write_behind::{ChangeBuffer, Clocks, Table, WriteBehind};
use wgkex_common::storage::{Noun, StorageError};

use crate::tenants::id::TenantId;

const CREATE_TABLES: &str = "
    CREATE TABLE addresses (
        tenant TEXT NOT NULL,
        key BLOB NOT NULL,
        address TEXT NOT NULL,
        PRIMARY KEY (tenant, key)
    ) WITHOUT ROWID;
";

/// A key in a tenant.
pub type TenantKey = (TenantId, PublicKey);
/// The changes that are not on disk yet: the address of each key.
pub type AddressBuffer = ChangeBuffer<TenantKey, IpAddr>;
/// The addresses of members that are there, and those that are held.
pub type Addresses = BTreeMap<TenantKey, IpAddr>;
/// The database of the addresses.
pub type AddressStore = WriteBehind<AddressTable>;

/// The table of the addresses.
#[derive(Debug)]
pub struct AddressTable(AddressBuffer);

/// The file in `state_dir`.
pub const FILE: StateFile = StateFile::sqlite("tenants.sqlite", AddressTable::SCHEMA);

/// Opens `tenants.sqlite` in `dir`, making it if it is missing, and returns its content. A corrupt file is set aside.
/// The only errors are that the file has a version which is not known here, and that another process has it.
pub fn open(dir: &Path) -> Result<(AddressStore, AddressBuffer, Addresses), StorageError> {
    let buffer = AddressBuffer::default();
    let table = AddressTable(buffer.clone());
    let (store, addresses) = WriteBehind::with_table(FILE.path(dir), table, Clocks::read())?;
    Ok((store, buffer, addresses))
}

impl Table for AddressTable {
    const SCHEMA: Schema = Schema { migrations: &[CREATE_TABLES] };
    const NOUN: Noun = Noun { name: "addresses of tenants", pronoun: "them" };
    type Content = Addresses;
    type Changes = BTreeMap<TenantKey, Option<IpAddr>>;

    fn load(&mut self, connection: &Connection, _now: Clocks) -> Result<Addresses, StorageError> {
        let mut statement = connection.prepare("SELECT tenant, key, address FROM addresses")?;
        let mut rows = statement.query([])?;
        let mut addresses = Addresses::new();
        while let Some(row) = rows.next()? {
            let (entry, address) = entry(row)?;
            addresses.insert(entry, address);
        }
        Ok(addresses)
    }

    fn take(&mut self) -> Self::Changes {
        self.0.take()
    }

    fn is_due(&self, changes: &Self::Changes, _now: Clocks) -> bool {
        !changes.is_empty()
    }

    fn write(&self, transaction: &Transaction<'_>, changes: &Self::Changes, _now: Clocks) -> rusqlite::Result<()> {
        let mut put = transaction.prepare("REPLACE INTO addresses VALUES (?1, ?2, ?3)")?;
        let mut remove = transaction.prepare("DELETE FROM addresses WHERE tenant = ?1 AND key = ?2")?;
        for ((tenant, key), address) in changes {
            match address {
                Some(address) => put.execute(params![tenant.as_str(), key.as_bytes(), address.to_string()])?,
                None => remove.execute(params![tenant.as_str(), key.as_bytes()])?,
            };
        }
        Ok(())
    }

    fn requeue(&mut self, changes: Self::Changes) {
        self.0.requeue(changes);
    }

    fn recreated(&mut self) {
        self.0.request_full_write();
    }
}

fn entry(row: &Row<'_>) -> Result<(TenantKey, IpAddr), StorageError> {
    let text = |column| row.get::<_, String>(column).map_err(|error| StorageError::corrupt_value(&error));
    let corrupt = |error: &dyn ToString| StorageError::Corrupt(error.to_string());
    let key = row.get(1).map_err(|error| StorageError::corrupt_value(&error))?;
    let key = PublicKey::from_bytes(key).map_err(|error| corrupt(&error))?;
    let tenant = TenantId::new(&text(0)?).map_err(|error| corrupt(&error))?;
    Ok(((tenant, key), text(2)?.parse().map_err(|error: std::net::AddrParseError| corrupt(&error))?))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn addresses_survive_and_a_damaged_file_is_written_anew() {
        let dir = tempfile::tempdir().unwrap();
        let key = |number| PublicKey::from_bytes([number; 32]).unwrap();
        let entry = |tenant: &str, number| (TenantId::new(tenant).unwrap(), key(number));
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        let (store, buffer, addresses) = open(dir.path()).unwrap();
        assert!(addresses.is_empty());
        for (entry, text) in [(entry("a", 2), "10.64.0.1"), (entry("A", 2), "10.64.16.1"), (entry("a", 3), "fd00::1")] {
            buffer.note(entry, Some(address(text)));
        }
        let store = store.flush(Clocks::read());
        buffer.note(entry("a", 3), None);
        buffer.note(entry("a", 2), Some(address("10.64.0.9")));
        drop(store.flush(Clocks::read()));
        let (store, _, addresses) = open(dir.path()).unwrap();
        let kept = [(entry("A", 2), address("10.64.16.1")), (entry("a", 2), address("10.64.0.9"))];
        assert_eq!(addresses, kept.into());
        drop(store);
        fs::write(dir.path().join("tenants.sqlite"), "damaged").unwrap();
        let (_store, buffer, addresses) = open(dir.path()).unwrap();
        assert!(addresses.is_empty() && buffer.needs_full_write() && !buffer.needs_full_write());
    }
}
