/* The locks of SAs, and the queue of those of which something is due: a limit reached, a peer that moved. */
#include "esp/path_private.h"

pthread_mutex_t *sa_lock(const struct esp_sa *sa)
{
    return &sa->path->locks[(sa->serial >> 32) % LOCKS].lock;
}

void path_note_due(struct esp_path *path, struct esp_sa *sa)
{
    pthread_mutex_lock(&path->due_lock);
    if (!sa->queued) {
        sa->queued = true;
        sa->next_due = NULL;
        if (path->last_due)
            path->last_due->next_due = sa;
        else
            path->first_due = sa;
        path->last_due = sa;
        __atomic_store_n(&path->due_count, path->due_count + 1, __ATOMIC_RELAXED);
    }
    pthread_mutex_unlock(&path->due_lock);
}

void path_forget_due(struct esp_path *path, struct esp_sa *sa)
{
    pthread_mutex_lock(&path->due_lock);
    struct esp_sa *before = NULL;
    for (struct esp_sa *each = sa->queued ? path->first_due : NULL; each; before = each, each = each->next_due) {
        if (each != sa)
            continue;
        *(before ? &before->next_due : &path->first_due) = sa->next_due;
        if (path->last_due == sa)
            path->last_due = before;
        sa->queued = false;
        __atomic_store_n(&path->due_count, path->due_count - 1, __ATOMIC_RELAXED);
        break;
    }
    pthread_mutex_unlock(&path->due_lock);
}

int esp_due_pending(struct esp_path *path)
{
    return __atomic_load_n(&path->due_count, __ATOMIC_RELAXED);
}

uint64_t esp_due_next(struct esp_path *path)
{
    uint64_t serial = 0;
    pthread_mutex_lock(&path->due_lock);
    struct esp_sa *sa = path->first_due;
    if (sa) {
        serial = sa->serial;
        path->first_due = sa->next_due;
        if (!path->first_due)
            path->last_due = NULL;
        sa->queued = false;
        __atomic_store_n(&path->due_count, path->due_count - 1, __ATOMIC_RELAXED);
    }
    pthread_mutex_unlock(&path->due_lock);
    return serial;
}
