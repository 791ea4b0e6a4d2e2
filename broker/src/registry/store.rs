//! The tables of the registry, and the operations of calls on them: each function runs within one transaction, checks
//! first, and writes only if no check fails.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use ipnet::IpNet;
use parking_lot::Mutex;
use serde::Serialize;
use wgkex_common::address::first_of;
use wgkex_common::wire::lease::{LeaseChange, LeaseContent, LeaseMessage, LeaseVersion};
use wgkex_common::{PublicKey, WorkerName};

use crate::database::{DatabaseError, Row, SqlValue, Transaction};
use crate::ipam;
use crate::registry::call_error::{CallError, CallRefusal};
use crate::registry::model::{ClientName, NewClient, NewServer, ServerName, leases};

/// A lease is the `number` of its address in the network, of 16 bytes. Networks have their first and last address behind a byte
/// for the IP version, so that the order of bytes is theirs. `next_free` is a server's lowest free number that is not in
/// [`ADD_RETURNED_NUMBERS`], or one beyond its addresses. A server's `id` is random, so that one which was deleted and added again has another. Its `revision` is when its
/// clients changed last ([`revision_after`]). `worker` is the one that registered it, empty if it was added by a call.
pub(super) const CREATE_TABLES: &str = "
    CREATE TABLE servers (
        id INTEGER PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        public_key TEXT NOT NULL UNIQUE,
        network TEXT NOT NULL,
        first_address BLOB NOT NULL UNIQUE,
        last_address BLOB NOT NULL,
        reserved BLOB NOT NULL,
        next_free BLOB NOT NULL,
        endpoint_address TEXT NOT NULL,
        endpoint_port INTEGER NOT NULL,
        allowed_ips TEXT NOT NULL,
        revision INTEGER NOT NULL,
        worker TEXT NOT NULL
    );
    CREATE TABLE peerings (
        id INTEGER PRIMARY KEY,
        server INTEGER NOT NULL REFERENCES servers (id),
        client TEXT NOT NULL,
        public_key TEXT NOT NULL,
        number BLOB NOT NULL,
        UNIQUE (server, client),
        UNIQUE (server, public_key),
        UNIQUE (server, number)
    );
    CREATE INDEX peerings_of_client ON peerings (client);
    CREATE INDEX peerings_of_key ON peerings (public_key);
    CREATE TABLE last_peering (id INTEGER NOT NULL);
    INSERT INTO last_peering VALUES (0);
";

/// Free numbers of a server that are below its `next_free`, so that a network with many leases is not searched for them.
pub(super) const ADD_RETURNED_NUMBERS: &str = "
    CREATE TABLE returned_numbers (
        server INTEGER NOT NULL REFERENCES servers (id),
        number BLOB NOT NULL,
        PRIMARY KEY (server, number)
    );
";

/// Taken addresses that are read at once, to find a free one.
const NUMBERS_PER_QUERY: i64 = 256;

/// A change of a server that is a worker of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerChange {
    /// The worker.
    pub worker: WorkerName,
    /// The message for it.
    pub message: LeaseMessage,
}

/// The numbers of servers and leases.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct RegistryCounts {
    /// Servers.
    pub servers: u64,
    /// Leases: pairs of a client and a server.
    pub leases: u64,
}

/// A server as `server/list_all` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ShownServer {
    endpoint_address: String,
    endpoint_port: i64,
    public_key: String,
}

/// A peering as `client/list_all` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ShownPeering {
    public_key: String,
    server: String,
}

/// A peer as `server/config` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ShownPeer {
    ip_address: IpAddr,
    public_key: String,
}

/// The configuration of a client, as `client/config` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ClientConfig {
    server: ShownServer,
    subnet: ShownLease,
    /// Its key, for a call that has it as a condition.
    #[serde(skip_serializing_if = "Option::is_none")]
    public_key: Option<PublicKey>,
}

/// A client's part of a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ShownLease {
    allowed_ips: String,
    lease: IpAddr,
}

/// The clients of a server, as JSON.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerConfig {
    /// Names this content and no other.
    pub version: String,
    /// The JSON; none if the caller has this version.
    pub json: Option<Bytes>,
}

/// The last JSON of some servers' clients, by version. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct ConfigCache(Arc<Mutex<VecDeque<(String, Bytes)>>>);

/// Servers whose JSON is kept.
const CACHED_MAX: usize = 8;

impl ConfigCache {
    fn get(&self, version: &str) -> Option<Bytes> {
        self.0.lock().iter().find(|(cached, _)| cached == version).map(|(_, json)| json.clone())
    }

    fn put(&self, version: &str, json: &Bytes) {
        let mut cached = self.0.lock();
        let server = version.split('-').next();
        cached.retain(|(version, _)| version.split('-').next() != server);
        cached.truncate(CACHED_MAX - 1);
        cached.push_front((version.to_owned(), json.clone()));
    }
}

/// The result of a job as JSON, made on the thread of the job.
pub fn json_of<T: Serialize>(value: &T) -> Result<Bytes, CallError> {
    let json = serde_json::to_vec(value).map_err(|error| DatabaseError::Corrupt(error.to_string()))?;
    Ok(json.into())
}

/// The result of a worker's request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RequestedLeases {
    /// The leases of its server.
    Server(LeaseSnapshot),
    /// The server whose version it has was deleted.
    Deleted(LeaseVersion),
    /// It has no server of this name.
    Nothing,
}

/// All leases of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseSnapshot {
    /// Their version.
    pub version: LeaseVersion,
    /// The leases; none if the caller has this version.
    pub leases: Option<BTreeMap<PublicKey, IpAddr>>,
}

/// A server whose clients change.
struct StoredServer {
    id: i64,
    name: String,
    next_free: u128,
    revision: i64,
    worker: String,
}

/// A server with the addresses that it hands out.
struct LeasingServer {
    server: StoredServer,
    network: IpNet,
    reserved: u64,
    lowest_free: u128,
}

impl StoredServer {
    /// The server in the columns of a row from `at` on.
    fn of_row(row: &Row, at: usize) -> Result<Self, DatabaseError> {
        Ok(Self {
            id: row.integer(at)?,
            name: row.text(at + 1)?.to_owned(),
            next_free: row.big(at + 2)?,
            revision: row.integer(at + 3)?,
            worker: row.text(at + 4)?.to_owned(),
        })
    }
}

/// How many servers and leases there are.
pub fn counts(transaction: &mut Transaction<'_>) -> Result<RegistryCounts, CallError> {
    let mut count = |sql| -> Result<u64, DatabaseError> {
        let row = transaction.first(sql, &[])?;
        Ok(row.map_or(Ok(0), |row| row.integer(0))?.unsigned_abs())
    };
    Ok(RegistryCounts {
        servers: count("SELECT count(*) FROM servers")?,
        leases: count("SELECT count(*) FROM peerings")?,
    })
}

/// Adds a server, which is to have this id, and is this worker if it is one of ours.
pub fn add_server(
    transaction: &mut Transaction<'_>,
    new: &NewServer,
    id: i64,
    worker: Option<&WorkerName>,
) -> Result<(), CallError> {
    let [first, last] = bounds(new.network);
    let (name, key) = (SqlValue::from(new.name.as_str()), new.public_key.to_string());
    if transaction.first("SELECT id FROM servers WHERE name = ?1", std::slice::from_ref(&name))?.is_some() {
        return Err(CallRefusal::NameTaken.into());
    }
    require_free_key(transaction, &key, KeyHolder::Nobody)?;
    let overlapping = "SELECT id FROM servers WHERE first_address <= ?1 AND last_address >= ?2";
    if transaction.first(overlapping, &[last.clone(), first.clone()])?.is_some() {
        return Err(CallRefusal::NetworkTaken.into());
    }
    transaction.execute(
        "INSERT INTO servers VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, 0, ?12)",
        &[
            id.into(),
            name,
            key.as_str().into(),
            new.network.to_string().as_str().into(),
            first,
            last,
            u128::from(new.reserved).into(),
            new.leases().first().into(),
            new.endpoint.address.as_str().into(),
            i64::from(new.endpoint.port.get()).into(),
            new.allowed_ips.as_str().into(),
            worker.map_or("", WorkerName::as_str).into(),
        ],
    )?;
    Ok(())
}

/// Adds the server that a worker is, or takes over its key and endpoint. A network of which clients have leases cannot be changed.
pub fn register(
    transaction: &mut Transaction<'_>,
    new: &NewServer,
    id: i64,
    worker: &WorkerName,
) -> Result<(), CallError> {
    let name = new.name.as_str();
    let found = match lessor(transaction, &new.name) {
        Err(CallError::Refused(CallRefusal::UnknownServer)) => return add_server(transaction, new, id, Some(worker)),
        found => found?,
    };
    if found.server.worker != worker.as_str() {
        return Err(CallRefusal::NameTaken.into());
    }
    if (found.network, found.reserved) != (new.network, new.reserved) {
        let values = [found.server.id.into()];
        if transaction.first("SELECT id FROM peerings WHERE server = ?1 LIMIT 1", &values)?.is_some() {
            return Err(CallRefusal::NetworkChanged.into());
        }
        // The worker has no lease of the old server, so no message is due.
        delete_server(transaction, &new.name)?;
        return add_server(transaction, new, id, Some(worker));
    }
    let key = new.public_key.to_string();
    require_free_key(transaction, &key, KeyHolder::Server(found.server.id))?;
    transaction.execute(
        "UPDATE servers SET public_key = ?2, endpoint_address = ?3, endpoint_port = ?4, allowed_ips = ?5 WHERE name = ?1",
        &[
            name.into(),
            key.as_str().into(),
            new.endpoint.address.as_str().into(),
            i64::from(new.endpoint.port.get()).into(),
            new.allowed_ips.as_str().into(),
        ],
    )?;
    Ok(())
}

/// Adds a client to a server, or gives it another key. It keeps the address that it has there. With the same key only
/// its id changes, which is not published.
pub fn add_client(
    transaction: &mut Transaction<'_>,
    new: &NewClient,
    now: SystemTime,
) -> Result<Vec<ServerChange>, CallError> {
    let lessor = lessor(transaction, &new.server)?;
    let server = &lessor.server;
    let (name, key) = (new.name.as_str(), new.public_key.to_string());
    require_free_key(transaction, &key, KeyHolder::Client(name))?;
    let leased = transaction.first(
        "SELECT number, public_key FROM peerings WHERE server = ?1 AND client = ?2",
        &[server.id.into(), name.into()],
    )?;
    let number = match &leased {
        Some(row) => {
            let values = [server.id.into(), name.into()];
            transaction.execute("DELETE FROM peerings WHERE server = ?1 AND client = ?2", &values)?;
            row.big(0)?
        }
        None => match new.lease {
            Some(address) => lease_this(transaction, &lessor, address)?,
            None => lease(transaction, &lessor)?,
        },
    };
    let address = address_of(lessor.network, number)?;
    if new.lease.is_some_and(|wanted| wanted != address) {
        return Err(CallRefusal::LeaseTaken.into());
    }
    transaction.execute("UPDATE last_peering SET id = id + 1", &[])?;
    transaction.execute(
        "INSERT INTO peerings SELECT id, ?1, ?2, ?3, ?4 FROM last_peering",
        &[server.id.into(), name.into(), key.as_str().into(), number.into()],
    )?;
    let before: Option<PublicKey> = leased.map(|row| row.parsed(1)).transpose()?;
    if before == Some(new.public_key) {
        return Ok(Vec::new());
    }
    let added = [(new.public_key, address.into())].into();
    let change = LeaseChange { added, removed: before.into_iter().collect(), ..LeaseChange::default() };
    record_change(transaction, server, change, now)
}

/// The holder that may have a key already.
#[derive(Debug, Clone, Copy)]
enum KeyHolder<'a> {
    Nobody,
    /// The server with this id.
    Server(i64),
    /// The client of this name, at any server.
    Client(&'a str),
}

/// Refuses a key that another server or client has.
fn require_free_key(transaction: &mut Transaction<'_>, key: &str, holder: KeyHolder<'_>) -> Result<(), CallError> {
    // No server has the id 0, and no client an empty name.
    let (server, client) = match holder {
        KeyHolder::Nobody => (0, ""),
        KeyHolder::Server(id) => (id, ""),
        KeyHolder::Client(name) => (0, name),
    };
    let others = transaction.first(
        "SELECT id FROM servers WHERE public_key = ?1 AND id <> ?2
         UNION ALL SELECT id FROM peerings WHERE public_key = ?1 AND client <> ?3",
        &[key.into(), server.into(), client.into()],
    )?;
    if others.is_some() { Err(CallRefusal::KeyTaken.into()) } else { Ok(()) }
}

/// The lowest free number of a server, which is no longer free then.
fn lease(transaction: &mut Transaction<'_>, lessor: &LeasingServer) -> Result<u128, CallError> {
    let (range, free) = (leases(lessor.network, lessor.reserved), lessor.lowest_free);
    if !range.contains(free) {
        return Err(CallRefusal::Exhausted.into());
    }
    take(transaction, &lessor.server, free)
}

/// The number of an address of a server, which is no longer free then.
fn lease_this(transaction: &mut Transaction<'_>, lessor: &LeasingServer, address: IpAddr) -> Result<u128, CallError> {
    let LeasingServer { server, network, reserved, .. } = lessor;
    let number = leases(*network, *reserved).number(address).ok_or(CallRefusal::NoLease)?;
    let values = [server.id.into(), number.into()];
    let holder = transaction.first("SELECT id FROM peerings WHERE server = ?1 AND number = ?2", &values)?;
    if holder.is_some() { Err(CallRefusal::LeaseTaken.into()) } else { take(transaction, server, number) }
}

/// Marks a free number as taken.
fn take(transaction: &mut Transaction<'_>, server: &StoredServer, number: u128) -> Result<u128, CallError> {
    if number < server.next_free {
        let values = [server.id.into(), number.into()];
        transaction.execute("DELETE FROM returned_numbers WHERE server = ?1 AND number = ?2", &values)?;
    } else if number == server.next_free {
        let next = next_free(transaction, server.id, number + 1)?;
        transaction.execute("UPDATE servers SET next_free = ?2 WHERE id = ?1", &[server.id.into(), next.into()])?;
    }
    Ok(number)
}

/// The lowest number from `from` on that no client of a server has.
fn next_free(transaction: &mut Transaction<'_>, server: i64, from: u128) -> Result<u128, CallError> {
    let mut next = from;
    loop {
        let page = transaction.query(
            "SELECT number FROM peerings WHERE server = ?1 AND number >= ?2 ORDER BY number LIMIT ?3",
            &[server.into(), next.into(), NUMBERS_PER_QUERY.into()],
        )?;
        let taken = page.iter().map(|row| row.big(0)).collect::<Result<Vec<_>, _>>()?;
        let (is_last, free) =
            (i64::try_from(taken.len()) != Ok(NUMBERS_PER_QUERY), ipam::lowest_free(next, taken.iter().copied()));
        if is_last || taken.last().is_some_and(|last| free < *last) {
            return Ok(free);
        }
        next = free;
    }
}

/// Removes a server and all its leases. That there is none is no error.
pub fn delete_server(transaction: &mut Transaction<'_>, name: &ServerName) -> Result<Vec<ServerChange>, CallError> {
    let found =
        transaction.first("SELECT id, worker, revision FROM servers WHERE name = ?1", &[name.as_str().into()])?;
    let Some(row) = found else { return Ok(Vec::new()) };
    let version = LeaseVersion { id: row.integer(0)?, revision: row.integer(2)? };
    transaction.execute("DELETE FROM peerings WHERE server = ?1", &[version.id.into()])?;
    transaction.execute("DELETE FROM returned_numbers WHERE server = ?1", &[version.id.into()])?;
    transaction.execute("DELETE FROM servers WHERE id = ?1", &[version.id.into()])?;
    let message = LeaseMessage { server: name.to_string(), version, content: LeaseContent::Deleted };
    change_for(row.text(1)?, message)
}

/// Removes a client from all servers.
pub fn delete_client(
    transaction: &mut Transaction<'_>,
    name: &ClientName,
    now: SystemTime,
) -> Result<Vec<ServerChange>, CallError> {
    let leased = transaction.query(
        "SELECT peerings.id, number, peerings.public_key,
            servers.id, name, next_free, revision, worker
         FROM peerings JOIN servers ON servers.id = server WHERE client = ?1 ORDER BY server",
        &[name.as_str().into()],
    )?;
    free(transaction, &leased, now)
}

/// Removes a client from one server.
pub fn remove_peer(
    transaction: &mut Transaction<'_>,
    client: &ClientName,
    server: &ServerName,
    now: SystemTime,
) -> Result<Vec<ServerChange>, CallError> {
    let leased = transaction.query(
        "SELECT peerings.id, number, peerings.public_key,
            servers.id, name, next_free, revision, worker
         FROM peerings JOIN servers ON servers.id = server WHERE client = ?1 AND name = ?2",
        &[client.as_str().into(), server.as_str().into()],
    )?;
    free(transaction, &leased, now)
}

/// Removes peerings: rows of an id, a number, a key, and a server, which is a different one in each row.
fn free(transaction: &mut Transaction<'_>, peerings: &[Row], now: SystemTime) -> Result<Vec<ServerChange>, CallError> {
    let mut changes = Vec::new();
    for peering in peerings {
        let (id, number, server) = (peering.integer(0)?, peering.big(1)?, StoredServer::of_row(peering, 3)?);
        transaction.execute("DELETE FROM peerings WHERE id = ?1", &[id.into()])?;
        if number < server.next_free {
            let values = [server.id.into(), number.into()];
            transaction.execute("INSERT INTO returned_numbers VALUES (?1, ?2)", &values)?;
        }
        let change = LeaseChange { removed: [peering.parsed(2)?].into(), ..LeaseChange::default() };
        changes.append(&mut record_change(transaction, &server, change, now)?);
    }
    Ok(changes)
}

/// Gives a server a new revision after a change of its clients; returns the message for its worker.
fn record_change(
    transaction: &mut Transaction<'_>,
    server: &StoredServer,
    change: LeaseChange,
    now: SystemTime,
) -> Result<Vec<ServerChange>, CallError> {
    let StoredServer { id, name, revision: after, worker, .. } = server;
    let version = LeaseVersion { id: *id, revision: revision_after(*after, now) };
    let values = [version.id.into(), version.revision.into()];
    transaction.execute("UPDATE servers SET revision = ?2 WHERE id = ?1", &values)?;
    let content = LeaseContent::Change(LeaseChange { after: *after, ..change });
    change_for(worker, LeaseMessage { server: name.clone(), version, content })
}

/// The revision that follows one: the time in microseconds, as long as that is higher. Where the last changes are lost,
/// because a copy of the database was restored or its server lost them, later changes do not get the revisions of the
/// lost ones.
fn revision_after(revision: i64, now: SystemTime) -> i64 {
    let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
    i64::try_from(now).unwrap_or(i64::MAX).max(revision.saturating_add(1))
}

/// Gives a worker's server a later revision than the worker knows: the worker has received changes that are lost.
pub fn raise_revision(
    transaction: &mut Transaction<'_>,
    worker: &WorkerName,
    known: LeaseVersion,
    now: SystemTime,
) -> Result<(), CallError> {
    transaction.execute(
        "UPDATE servers SET revision = ?3 WHERE id = ?1 AND worker = ?2 AND revision < ?3",
        &[known.id.into(), worker.as_str().into(), revision_after(known.revision, now).into()],
    )?;
    Ok(())
}

/// The change for the worker of this name; none if the name is empty.
fn change_for(worker: &str, message: LeaseMessage) -> Result<Vec<ServerChange>, CallError> {
    if worker.is_empty() {
        return Ok(Vec::new());
    }
    let worker = worker.parse().map_err(|_| DatabaseError::Corrupt("a server has no worker's name".into()))?;
    Ok(vec![ServerChange { worker, message }])
}

/// All leases of a worker's server, unless it has the version `known`.
pub fn snapshot(
    transaction: &mut Transaction<'_>,
    worker: &WorkerName,
    server: &str,
    known: Option<LeaseVersion>,
) -> Result<RequestedLeases, CallError> {
    let row = transaction.first(
        "SELECT id, revision, network FROM servers WHERE name = ?1 AND worker = ?2",
        &[server.into(), worker.as_str().into()],
    )?;
    let Some(row) = row else { return without_server(transaction, known) };
    let (version, network) = (LeaseVersion { id: row.integer(0)?, revision: row.integer(1)? }, row.parsed::<IpNet>(2)?);
    if known == Some(version) {
        return Ok(RequestedLeases::Server(LeaseSnapshot { version, leases: None }));
    }
    let peers = transaction.query("SELECT public_key, number FROM peerings WHERE server = ?1", &[version.id.into()])?;
    let lease = |row: &Row| Ok((row.parsed(0)?, leased(network, row, 1)?));
    let leases = peers.iter().map(lease).collect::<Result<_, CallError>>()?;
    Ok(RequestedLeases::Server(LeaseSnapshot { version, leases: Some(leases) }))
}

/// The result for a worker without a server of this name. The server that it knows may be another worker's now, as
/// after a change of the worker's name.
fn without_server(
    transaction: &mut Transaction<'_>,
    known: Option<LeaseVersion>,
) -> Result<RequestedLeases, CallError> {
    let Some(known) = known else { return Ok(RequestedLeases::Nothing) };
    let found = transaction.first("SELECT id FROM servers WHERE id = ?1", &[known.id.into()])?;
    Ok(if found.is_some() { RequestedLeases::Nothing } else { RequestedLeases::Deleted(known) })
}

/// All servers by name.
pub fn list_servers(transaction: &mut Transaction<'_>) -> Result<BTreeMap<String, ShownServer>, CallError> {
    let rows = transaction
        .query("SELECT endpoint_address, endpoint_port, public_key, name FROM servers ORDER BY name", &[])?;
    rows.iter().map(|row| Ok((row.text(3)?.to_owned(), shown_server(row)?))).collect()
}

/// All clients by name, with their peerings by id.
pub fn list_clients(
    transaction: &mut Transaction<'_>,
) -> Result<BTreeMap<String, BTreeMap<i64, ShownPeering>>, CallError> {
    let rows = transaction.query(
        "SELECT client, peerings.id, peerings.public_key, name FROM peerings JOIN servers ON servers.id = server",
        &[],
    )?;
    let mut clients = BTreeMap::<_, BTreeMap<_, _>>::new();
    for row in rows {
        let peering = ShownPeering { public_key: row.text(2)?.to_owned(), server: row.text(3)?.to_owned() };
        clients.entry(row.text(0)?.to_owned()).or_default().insert(row.integer(1)?, peering);
    }
    Ok(clients)
}

/// Whether there is a server of this name.
pub fn require_server(transaction: &mut Transaction<'_>, name: &ServerName) -> Result<(), CallError> {
    lessor(transaction, name).map(drop)
}

/// The own address of a server.
pub fn wireguard_ip(transaction: &mut Transaction<'_>, name: &ServerName) -> Result<IpAddr, CallError> {
    Ok(first_of(lessor(transaction, name)?.network))
}

/// The clients of a server in the order of their addresses, unless the caller has one of the versions that `is_known` names.
pub fn server_config(
    transaction: &mut Transaction<'_>,
    name: &ServerName,
    cache: &ConfigCache,
    is_known: impl FnOnce(&str) -> bool,
) -> Result<ServerConfig, CallError> {
    let row =
        transaction.first("SELECT id, network, revision FROM servers WHERE name = ?1", &[name.as_str().into()])?;
    let row = row.ok_or(CallRefusal::UnknownServer)?;
    let (id, network, revision) = (row.integer(0)?, row.parsed::<IpNet>(1)?, row.integer(2)?);
    let version = format!("{id:x}-{revision:x}");
    if is_known(&version) {
        return Ok(ServerConfig { version, json: None });
    }
    if let Some(json) = cache.get(&version) {
        return Ok(ServerConfig { version, json: Some(json) });
    }
    let rows =
        transaction.query("SELECT number, public_key FROM peerings WHERE server = ?1 ORDER BY number", &[id.into()])?;
    let peer = |row: &Row| Ok(ShownPeer { ip_address: leased(network, row, 0)?, public_key: row.text(1)?.to_owned() });
    let peers: Vec<ShownPeer> = rows.iter().map(peer).collect::<Result<_, CallError>>()?;
    let json = json_of(&BTreeMap::from([("peers", peers)]))?;
    cache.put(&version, &json);
    Ok(ServerConfig { version, json: Some(json) })
}

/// The configuration of a client for a server; an error if `key` is given, and the client has another one.
pub fn client_config(
    transaction: &mut Transaction<'_>,
    client: &ClientName,
    server: &ServerName,
    key: Option<PublicKey>,
) -> Result<ClientConfig, CallError> {
    let row = transaction.first(
        "SELECT endpoint_address, endpoint_port, servers.public_key, network, allowed_ips, number, peerings.public_key
         FROM peerings JOIN servers ON servers.id = server WHERE client = ?1 AND name = ?2",
        &[client.as_str().into(), server.as_str().into()],
    )?;
    let row = row.ok_or(CallRefusal::UnknownPeering)?;
    if key.is_some() && key != Some(row.parsed(6)?) {
        return Err(CallRefusal::UnknownPeering.into());
    }
    let subnet = ShownLease { allowed_ips: row.text(4)?.to_owned(), lease: leased(row.parsed::<IpNet>(3)?, &row, 5)? };
    Ok(ClientConfig { server: shown_server(&row)?, subnet, public_key: key })
}

fn lessor(transaction: &mut Transaction<'_>, name: &ServerName) -> Result<LeasingServer, CallError> {
    let row = transaction.first(
        "SELECT id, name, next_free, revision, worker, network, reserved, COALESCE(
            (SELECT number FROM returned_numbers WHERE server = servers.id ORDER BY number LIMIT 1), next_free)
         FROM servers WHERE name = ?1",
        &[name.as_str().into()],
    )?;
    let row = row.ok_or(CallRefusal::UnknownServer)?;
    Ok(LeasingServer {
        server: StoredServer::of_row(&row, 0)?,
        network: row.parsed(5)?,
        reserved: u64::try_from(row.big(6)?).unwrap_or(u64::MAX),
        lowest_free: row.big(7)?,
    })
}

/// A row that begins with a server's endpoint and key.
fn shown_server(row: &Row) -> Result<ShownServer, DatabaseError> {
    Ok(ShownServer {
        endpoint_address: row.text(0)?.to_owned(),
        endpoint_port: row.integer(1)?,
        public_key: row.text(2)?.to_owned(),
    })
}

/// The address in a column, of this network.
fn leased(network: IpNet, row: &Row, column: usize) -> Result<IpAddr, DatabaseError> {
    address_of(network, row.big(column)?)
}

fn address_of(network: IpNet, number: u128) -> Result<IpAddr, DatabaseError> {
    ipam::Range::hosts(network)
        .address(number)
        .ok_or_else(|| DatabaseError::Corrupt("an address is outside of its network".into()))
}

/// The first and the last address of a network.
fn bounds(network: IpNet) -> [SqlValue; 2] {
    [network.network(), network.broadcast()].map(|address| {
        let (version, bits) = match address {
            IpAddr::V4(address) => (4, u128::from(address.to_bits())),
            IpAddr::V6(address) => (6, address.to_bits()),
        };
        SqlValue::Bytes([&[version], bits.to_be_bytes().as_slice()].concat())
    })
}

/// An id for a new server.
#[must_use]
pub fn new_id() -> i64 {
    fastrand::i64(1..)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::path::Path;
    use std::time::{Duration, Instant};

    use rusqlite::params;
    use serde_json::json;
    use wgkex_common::storage::schema::Schema;
    use wgkex_common::storage::sqlite;

    use super::*;
    use crate::database::{AccessMode, Database, HadRowsMark, Location};
    use crate::registry::MIGRATIONS;
    use crate::registry::model::CallFields;
    use crate::testing::key;

    fn fields(value: serde_json::Value) -> CallFields {
        let serde_json::Value::Object(fields) = value else { panic!("{value}") };
        CallFields(fields)
    }

    fn add(transaction: &mut Transaction<'_>, n: u32) -> Result<IpAddr, CallError> {
        let new = json!({ "client_name": format!("c{n}"), "server_name": "s1", "public_key": key(n) });
        let new = fields(new).new_client().unwrap();
        add_client(transaction, &new, SystemTime::now())?;
        Ok(client_config(transaction, &new.name, &new.server, None)?.subnet.lease)
    }

    async fn run<T: Send + 'static>(
        database: &Database,
        work: impl FnOnce(&mut Transaction<'_>) -> Result<T, CallError> + Send + 'static,
    ) -> T {
        database.run(AccessMode::Write, work, |_| {}).await.unwrap()
    }

    /// How long it takes to remove the client with the lowest of so many addresses, and to add two others.
    async fn churn(clients: u32) -> Duration {
        let dir = tempfile::tempdir().unwrap();
        let (database, _end) =
            Database::start(Location::File(dir.path().join("f")), MIGRATIONS, HadRowsMark::default()).unwrap();
        let server = fields(json!({
            "server_name": "s1", "network_address": "10.0.0.0", "network_mask": 8, "public_key": key(u32::MAX),
            "endpoint_address": "gw", "endpoint_port": 1, "n_reserved_ips": 0, "allowed_ips": "10.0.0.0/8",
        }));
        let server = server.new_server().unwrap();
        run(&database, move |tables| add_server(tables, &server, 7, None)).await;
        for first in (0..clients).step_by(500) {
            run(&database, move |tables| (first..first + 500).try_for_each(|n| add(tables, n).map(drop))).await;
        }
        run(&database, move |tables| {
            let begun = Instant::now();
            let address = |number: u32| IpAddr::from(Ipv4Addr::from((10 << 24) + number));
            for n in 0..20 {
                let lowest = if n == 0 { 0 } else { clients + 2 * n };
                delete_client(tables, &format!("c{lowest}").parse().unwrap(), SystemTime::now())?;
                let next = clients + 2 * n + 2;
                let leased = [add(tables, next)?, add(tables, next + 1)?];
                assert_eq!(leased, [address(2), address(clients + 2 + n)]);
            }
            Ok(begun.elapsed())
        })
        .await
    }

    /// Failed before: all clients were read to find the next free address.
    #[tokio::test]
    async fn an_address_costs_the_same_with_many_clients() {
        let (few, many) = (churn(500).await, churn(10_000).await);
        assert!(many < 5 * few, "{many:?} with many, {few:?} with few");
    }

    /// The tables as they were before [`ADD_RETURNED_NUMBERS`], with the clients `c2`, `c3` and `c5` at the numbers in
    /// their names. `c4` was deleted, which made its number the next free one.
    fn write_first_version(file: &Path) {
        let connection = sqlite::open(file, Schema { migrations: &MIGRATIONS.0[..1] }).unwrap();
        let network = "10.0.0.0/29";
        let [first, last] = bounds(network.parse().unwrap());
        let server =
            params![key(u32::MAX).to_string(), network, first, last, SqlValue::from(0_u128), SqlValue::from(4_u128)];
        connection
            .execute("INSERT INTO servers VALUES (7, 's1', ?1, ?2, ?3, ?4, ?5, ?6, 'gw', 1, '::/0', 9, 'gw1')", server)
            .unwrap();
        for n in [2, 3, 5] {
            let client = params![n - 1, format!("c{n}"), key(n).to_string(), SqlValue::from(u128::from(n))];
            connection.execute("INSERT INTO peerings VALUES (?1, 7, ?2, ?3, ?4)", client).unwrap();
        }
        connection.execute("UPDATE last_peering SET id = 4", []).unwrap();
    }

    fn shown(transaction: &mut Transaction<'_>) -> Result<Vec<(String, i64, String, IpAddr)>, CallError> {
        let mut shown = Vec::new();
        for (client, peerings) in list_clients(transaction)? {
            let name = client.parse().unwrap();
            for (id, ShownPeering { public_key, server }) in peerings {
                let lease = client_config(transaction, &name, &server.parse().unwrap(), None)?.subnet.lease;
                shown.push((client.clone(), id, public_key, lease));
            }
        }
        Ok(shown)
    }

    #[tokio::test]
    async fn tables_of_the_first_version_keep_their_rows_and_addresses_that_are_given_back_are_leased_again() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        write_first_version(&file);
        let (database, _end) = Database::start(Location::File(file), MIGRATIONS, HadRowsMark::default()).unwrap();
        run(&database, |tables| {
            let address = |number| IpAddr::from(Ipv4Addr::new(10, 0, 0, number));
            let client = |n: u8| (format!("c{n}"), i64::from(n) - 1, key(n.into()).to_string(), address(n));
            assert_eq!(shown(tables)?, [2, 3, 5].map(client));
            let server =
                ShownServer { endpoint_address: "gw".into(), endpoint_port: 1, public_key: key(u32::MAX).to_string() };
            assert_eq!(list_servers(tables)?, [("s1".to_owned(), server)].into());
            assert_eq!(counts(tables)?, RegistryCounts { servers: 1, leases: 3 });

            assert_eq!([add(tables, 6)?, add(tables, 7)?], [4, 6].map(address), "those that are free");
            assert!(matches!(add(tables, 8), Err(CallError::Refused(CallRefusal::Exhausted))));
            for name in ["c5", "c6", "c2"] {
                let changes = delete_client(tables, &name.parse().unwrap(), SystemTime::now())?;
                assert_eq!(changes.iter().map(|change| change.worker.as_str()).collect::<Vec<_>>(), ["gw1"]);
            }
            assert_eq!([add(tables, 9)?, add(tables, 10)?, add(tables, 11)?], [2, 4, 5].map(address));
            assert!(matches!(add(tables, 12), Err(CallError::Refused(CallRefusal::Exhausted))));
            delete_client(tables, &"c3".parse().unwrap(), SystemTime::now())?;
            delete_server(tables, &"s1".parse().unwrap())?;
            assert_eq!(counts(tables)?, RegistryCounts { servers: 0, leases: 0 });
            assert!(tables.first("SELECT number FROM returned_numbers", &[])?.is_none());
            Ok(())
        })
        .await;
    }
}
