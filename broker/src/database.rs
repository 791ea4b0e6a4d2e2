//! The database of state that must be on disk at once, such as leases: each change is a transaction that is committed
//! before it is acknowledged. SQLite in `state_dir`, or `PostgreSQL` where several brokers share it; one SQL for both.
//!
//! Tasks: one thread ([`Database::start`]) owns the connection and runs one job after the other, so that neither a slow
//! disk nor a slow server keeps a thread of the HTTP servers waiting. Jobs that queue up meanwhile are committed
//! together. Callers: the rooms with tables, by [`Database::run`].

mod connection;
mod had_rows_mark;
mod postgres;
mod row;
mod sqlite;
mod types;

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;
use tracing::{error, info, warn};

use self::connection::{Connection, Connector};
pub use self::connection::{Location, Transaction};
pub use self::had_rows_mark::HadRowsMark;
pub use self::row::{Row, SqlValue};
pub use self::types::{AccessMode, DatabaseError, Migrations};

/// Jobs that wait at most; further ones are refused at once.
const WAITING_JOBS_MAX: usize = 1024;
/// Jobs that are committed together at most.
const JOBS_PER_COMMIT_MAX: usize = 128;
/// How long they may take together; the jobs that are left then are the first of the next batch. Other brokers wait for
/// a lock meanwhile, and give up after 3 s.
const BATCH_TIME: Duration = Duration::from_secs(2);
/// How long a caller waits for its job.
const JOB_TIMEOUT: Duration = Duration::from_secs(8);

/// Gives jobs to the thread. Clones share it.
#[derive(Debug, Clone)]
pub struct Database {
    jobs: mpsc::Sender<DatabaseJob>,
    state: watch::Receiver<DatabaseState>,
}

/// Whether the database can be used.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum DatabaseState {
    /// It was not tried yet.
    #[default]
    Starting,
    /// The last job was done.
    Up,
    /// It cannot be used, for this reason.
    Down(String),
}

/// Work for the thread. `run` does it within a transaction and returns a function to be called when the transaction has
/// ended.
struct DatabaseJob {
    access: AccessMode,
    run: Box<dyn FnOnce(&mut Transaction<'_>) -> Finish + Send>,
}

/// Reports the outcome of a job, which may be that of the commit.
type Finish = Box<dyn FnOnce(Result<(), DatabaseError>)>;

impl Database {
    /// Starts the thread. It opens the database at its first job and again after each failure, so that an unreachable
    /// server does not keep a broker from starting. A database that has lost its tables by `mark` is not used. The
    /// receiver ends with the thread.
    pub fn start(
        location: Location,
        migrations: Migrations,
        mark: HadRowsMark,
    ) -> io::Result<(Self, oneshot::Receiver<()>)> {
        let (jobs, queue) = mpsc::channel(WAITING_JOBS_MAX);
        let (publish, state) = watch::channel(DatabaseState::Starting);
        let (ended, end) = oneshot::channel();
        thread::Builder::new().name("database".into()).spawn(move || {
            let connector = Connector::new(location, migrations, mark);
            DatabaseThread { connector, connection: None, state: publish, is_away: false, is_write_failing: false }
                .run(queue);
            drop(ended);
        })?;
        Ok((Self { jobs, state }, end))
    }

    /// Whether it can be used, as of the last job.
    #[must_use]
    pub fn state(&self) -> DatabaseState {
        self.state.borrow().clone()
    }

    /// Runs `work` in a transaction, and returns when that is committed. An error of `work` rolls back its changes.
    /// `committed` is called on the thread, after the commit and before anything else is done there: calls have the
    /// order of the changes.
    pub async fn run<T, E>(
        &self,
        access: AccessMode,
        work: impl FnOnce(&mut Transaction<'_>) -> Result<T, E> + Send + 'static,
        committed: impl FnOnce(&T) + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<DatabaseError> + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let run = move |transaction: &mut Transaction<'_>| {
            if answer.is_closed() {
                // The caller no longer waits, and has received the error that it is not done.
                let nothing: Finish = Box::new(|_| {});
                return nothing;
            }
            let result = transaction.within_savepoint(work);
            let finish: Finish = Box::new(move |outcome: Result<(), DatabaseError>| {
                let result = outcome.map_err(E::from).and(result);
                if let Ok(result) = &result {
                    committed(result);
                }
                // The caller may no longer wait.
                let _ = answer.send(result);
            });
            finish
        };
        let unavailable = |reason: &str| E::from(DatabaseError::Unavailable(reason.into()));
        let job = DatabaseJob { access, run: Box::new(run) };
        self.jobs.try_send(job).map_err(|_| unavailable("too many calls wait for it"))?;
        match timeout(JOB_TIMEOUT, answered).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(unavailable(&self.reason())),
            Err(_) => Err(unavailable("it does not answer in time")),
        }
    }

    fn reason(&self) -> String {
        match self.state() {
            DatabaseState::Down(reason) => reason,
            DatabaseState::Starting | DatabaseState::Up => "it was lost".into(),
        }
    }
}

/// The state of the thread.
struct DatabaseThread {
    connector: Connector,
    connection: Option<Connection>,
    state: watch::Sender<DatabaseState>,
    /// The last attempt to connect failed.
    is_away: bool,
    /// The last job that may write failed, though the database was reachable.
    is_write_failing: bool,
}

impl DatabaseThread {
    /// Runs jobs until all senders are dropped. Jobs that only read do not wait for changes of other brokers.
    fn run(mut self, mut queue: mpsc::Receiver<DatabaseJob>) {
        let mut jobs = Vec::with_capacity(JOBS_PER_COMMIT_MAX);
        while !jobs.is_empty() || queue.blocking_recv_many(&mut jobs, JOBS_PER_COMMIT_MAX) > 0 {
            while jobs.len() < JOBS_PER_COMMIT_MAX
                && let Ok(job) = queue.try_recv()
            {
                jobs.push(job);
            }
            let (reads, writes): (Vec<_>, Vec<_>) = jobs.drain(..).partition(|job| job.access == AccessMode::Read);
            for (access, mut batch) in [(AccessMode::Read, reads), (AccessMode::Write, writes)] {
                if batch.is_empty() {
                    continue;
                }
                let outcome = self.run_batch(access, &mut batch);
                if outcome.is_ok() {
                    jobs.append(&mut batch);
                }
                self.report(access, outcome);
                // Without a database the remaining jobs are dropped here; their callers receive an error.
            }
        }
    }

    /// Runs jobs in one transaction, at least one. If that cannot begin, the connection is lost, or they take too long, the others
    /// stay.
    fn run_batch(&mut self, access: AccessMode, jobs: &mut Vec<DatabaseJob>) -> Result<(), DatabaseError> {
        let (mut connection, until) = (self.begun(access)?, Instant::now() + BATCH_TIME);
        let mut transaction = Transaction::of(&mut connection);
        let mut finishes = Vec::<Finish>::new();
        for job in std::mem::take(jobs) {
            let is_late = !finishes.is_empty() && Instant::now() > until;
            if transaction.is_lost() || is_late {
                jobs.push(job);
            } else {
                finishes.push((job.run)(&mut transaction));
            }
        }
        let committed = transaction.commit();
        for finish in finishes {
            finish(committed.clone());
        }
        self.connection = committed.is_ok().then_some(connection);
        committed
    }

    /// A connection in a transaction. One that the server has closed meanwhile is replaced.
    fn begun(&mut self, access: AccessMode) -> Result<Connection, DatabaseError> {
        if let Some(mut connection) = self.connection.take()
            && connection.begin(access).is_ok()
        {
            return Ok(connection);
        }
        let connected = self.connector.connect();
        self.is_away = connected.is_err();
        // Without a connection, the outcome of the last write has no meaning.
        self.is_write_failing &= connected.is_ok();
        let mut connection = connected?;
        connection.begin(access)?;
        Ok(connection)
    }

    /// Publishes whether the database can be used, and logs each change of that. After a failed write only a successful
    /// one shows that it can be used, unless connecting has failed since.
    fn report(&mut self, access: AccessMode, outcome: Result<(), DatabaseError>) {
        if access == AccessMode::Write {
            self.is_write_failing = outcome.is_err() && !self.is_away;
        }
        let database = self.connector.location();
        let is_emptied = matches!(outcome, Err(DatabaseError::Emptied(_)));
        let next = match outcome {
            Ok(()) if self.is_write_failing => return,
            Ok(()) => DatabaseState::Up,
            Err(error) => DatabaseState::Down(error.to_string()),
        };
        let before = self.state.send_replace(next.clone());
        match (before, next) {
            (before, DatabaseState::Down(reason)) if is_emptied && before != DatabaseState::Down(reason.clone()) => {
                error!(%database, reason, "the database is empty, calls that need it are answered 503");
            }
            (DatabaseState::Down(_), DatabaseState::Up) => info!(%database, "the database is back"),
            (DatabaseState::Starting, DatabaseState::Up) => info!(%database, "the database is open"),
            (DatabaseState::Starting | DatabaseState::Up, DatabaseState::Down(reason)) => {
                warn!(%database, reason, "the database cannot be used, calls that need it are answered 503");
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const TABLE: Migrations = Migrations(&["CREATE TABLE t (a INTEGER NOT NULL, b TEXT NOT NULL, c BLOB NOT NULL)"]);
    const NEWER: Migrations = Migrations(&[TABLE.0[0], "CREATE TABLE u (a INTEGER)"]);

    fn open(file: &Path, migrations: Migrations) -> Database {
        Database::start(Location::File(file.to_owned()), migrations, HadRowsMark::default()).unwrap().0
    }

    fn insert(transaction: &mut Transaction<'_>, number: i64) -> Result<(), DatabaseError> {
        let values = [number.into(), "é'%".into(), 7_u128.into()];
        transaction.execute("INSERT INTO t VALUES (?1, ?2, ?3)", &values).map(drop)
    }

    async fn rows(database: &Database) -> Result<Vec<Row>, DatabaseError> {
        database
            .run(AccessMode::Read, |transaction| transaction.query("SELECT a, b, c FROM t ORDER BY a", &[]), |_| {})
            .await
    }

    #[tokio::test]
    async fn a_job_that_fails_takes_back_what_it_did_and_only_that() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        let database = open(&file, TABLE);
        assert_eq!(database.state(), DatabaseState::Starting);
        let order = std::sync::Arc::new(parking_lot::Mutex::new(Vec::new()));
        let job = |number: i64| {
            let order = order.clone();
            let work = move |transaction: &mut Transaction<'_>| {
                insert(transaction, number)?;
                if number % 2 == 0 { Err(DatabaseError::Corrupt("even".into())) } else { Ok(number) }
            };
            database.run(AccessMode::Write, work, move |number| order.lock().push(*number))
        };
        let results = futures_util::future::join_all((0..20).map(job)).await;
        assert!(results.iter().zip(0_i64..).all(|(result, number)| result.is_ok() == (number % 2 == 1)));
        let found = rows(&database).await.unwrap();
        assert_eq!(*order.lock(), [1, 3, 5, 7, 9, 11, 13, 15, 17, 19]);
        assert_eq!(found.iter().map(|row| row.integer(0).unwrap()).collect::<Vec<_>>(), *order.lock());
        assert_eq!((found[0].text(1), found[0].big(2)), (Ok("é'%"), Ok(7)));
        assert!(found[0].text(0).is_err() && found[0].integer(9).is_err());
        wait_until_up(&database).await;
    }

    #[tokio::test]
    async fn a_newer_layout_is_not_touched() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        let newer = open(&file, NEWER);
        newer.run(AccessMode::Write, |transaction| insert(transaction, 1), |()| {}).await.unwrap();
        drop(newer);
        let error = loop {
            // The thread of the newer database releases the file when it has ended.
            let error = rows(&open(&file, TABLE)).await.unwrap_err().to_string();
            if !error.contains("another process") {
                break error;
            }
        };
        assert!(error.contains("newer than those up to 1"), "{error}");
        let newer = open(&file, NEWER);
        assert_eq!(rows(&newer).await.unwrap().len(), 1);
    }

    /// Failed before: the database was created again, and was empty.
    #[tokio::test]
    async fn a_database_that_had_rows_and_lost_its_tables_is_refused_until_it_is_back() {
        let dir = tempfile::tempdir().unwrap();
        let [file, copy, mark_file] = ["f", "copy", "mark"].map(|name| dir.path().join(name));
        let start = |is_set| {
            let mark = HadRowsMark::new(mark_file.clone(), is_set);
            (Database::start(Location::File(file.clone()), TABLE, mark.clone()).unwrap(), mark)
        };
        let ((database, end), mark) = start(false);
        database.run(AccessMode::Write, |transaction| insert(transaction, 1), |()| {}).await.unwrap();
        assert_eq!(mark.lost_rows(), None);
        drop(database);
        end.await.unwrap_err();
        std::fs::rename(&file, &copy).unwrap();
        for is_there in [false, true] {
            if is_there {
                std::fs::write(&file, "").unwrap();
            }
            let ((database, end), mark) = start(true);
            let refused = rows(&database).await.unwrap_err().to_string();
            assert!(refused.contains("remove") && refused.contains("mark while this broker is stopped"), "{refused}");
            assert_eq!(mark.lost_rows(), Some(&*mark_file));
            drop(database);
            end.await.unwrap_err();
            assert_eq!(std::fs::metadata(&file).unwrap().len(), 0, "nothing is made of it");
        }
        let ((database, _end), mark) = start(true);
        rows(&database).await.unwrap_err();
        std::fs::rename(&copy, &file).unwrap();
        while rows(&database).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!((rows(&database).await.unwrap().len(), mark.lost_rows()), (1, None));
    }

    /// The result of a call may be received before the new state.
    async fn wait_until_up(database: &Database) {
        while database.state() != DatabaseState::Up {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    #[tokio::test]
    async fn a_database_that_was_away_is_back() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        std::fs::create_dir(&file).unwrap();
        let database = open(&file, TABLE);
        assert!(matches!(rows(&database).await, Err(DatabaseError::Unavailable(_))));
        assert!(matches!(database.state(), DatabaseState::Down(_)));
        std::fs::remove_dir(&file).unwrap();
        while rows(&database).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        wait_until_up(&database).await;
    }
}
